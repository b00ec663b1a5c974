"""The Python API: models in memory and on the disk, the same code and the same refusals as the commands."""

from __future__ import annotations

import errno
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers

import megatron_ligo as ligo
from megatron_ligo.api.settings import LargeSizes
from megatron_ligo.config.run_config import LargeSection, RunConfig
from megatron_ligo.distributed import mesh
from megatron_ligo.export.handoff import grow_from_config
from tests.checkpoint import hf_models
from tests.training.test_pretrain import make_pair

LLAMA = {"num_layers": 3, "hidden_size": 60, "ffn_size": 64, "num_heads": 12, "num_kv_heads": 4}


def gpt_neox() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.GPTNeoXConfig(**sizes, intermediate_size=32, max_position_embeddings=32)
    return transformers.GPTNeoXForCausalLM(config).eval()


def vit() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()


def test_the_import_needs_no_torch():
    code = "import sys, megatron_ligo as ligo; ligo.LigoError; dir(ligo); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
    with pytest.raises(AttributeError, match="gorw"):
        ligo.gorw  # noqa: B018


def test_a_package_that_is_missing_is_an_error_of_ours(tmp_path, monkeypatch):
    """In an environment without DeepSpeed or Megatron-core."""
    pair = {"model": hf_models.model("llama"), "large": LLAMA, "data": "train", "valid": "valid"}
    calls = {"deepspeed_mpu": lambda: ligo.deepspeed_mpu, "fit": lambda: ligo.fit(**pair, output=tmp_path / "fit")}
    for name in ("api.training_scripts", "training.fit", "training.engine"):
        monkeypatch.delitem(sys.modules, f"megatron_ligo.{name}", raising=False)
    monkeypatch.delitem(vars(ligo), "deepspeed_mpu", raising=False)
    for name in ("deepspeed", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in calls.values():
        with pytest.raises(ligo.MachineError, match=r"pip install (deepspeed|megatron-core)"):
            call()


def test_the_stub_states_every_name():
    """Type checkers read __init__.pyi."""
    stub = Path(ligo.__file__).with_suffix(".pyi").read_text()
    assert all(f"import {name} as {name}\n" in stub for name in ligo.__all__ if not name.startswith("__"))
    assert all(getattr(ligo, name) is not None for name in ligo.__all__)


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (lambda: hf_models.model("llama", tied=True), LLAMA),
        (lambda: hf_models.model("qwen2"), {"hidden_size": 60, "num_heads": 12, "num_kv_heads": 4}),
        (gpt_neox, {"num_layers": 3, "hidden_size": 32, "ffn_size": 64, "num_heads": 4}),
        (vit, {"num_layers": 3, "hidden_size": 32, "ffn_size": 64, "num_heads": 4}),
    ],
    ids=["llama", "qwen2", "gpt_neox", "vit"],
)
def test_a_grown_model_computes_what_the_small_one_does(build, sizes):
    small = build()
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    large = ligo.grow(small, **sizes)
    assert type(large) is type(small) and large.num_parameters() > small.num_parameters()
    inputs = torch.randn(2, 3, 8, 8) if small.main_input_name == "pixel_values" else hf_models.tokens()
    with torch.no_grad():
        assert torch.allclose(small(inputs)[0], large(inputs)[0], atol=2e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_memory_and_folder_give_the_same_weights(tmp_path):
    """The command's hand-off, and growth of a model that was never saved, are equal bit by bit."""
    small, folder = hf_models.saved(tmp_path / "small")
    config = RunConfig.from_dict({"small": {"path": str(folder)}, "large": LLAMA, "handoff": {"formats": ["hf"]}})
    grow_from_config(config, None, tmp_path / "grown")
    large = ligo.grow(small, **LLAMA)
    assert ligo.verify(large, tmp_path / "grown").same
    assert ligo.verify(ligo.grow(folder, **LLAMA), large).same
    ligo.write_handoff(small, tmp_path / "again", **LLAMA, settings={"handoff.formats": ["hf"]})
    assert ligo.verify(tmp_path / "again" / "hf", large).same and ligo.verify(tmp_path / "again" / "hf").same
    ligo.grow(small, **LLAMA, method="stack").save_pretrained(tmp_path / "stack")
    assert not ligo.verify(tmp_path / "stack", large).same
    assert not ligo.verify(tmp_path / "stack", large, logits=True).same
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    assert not ligo.verify(large, tmp_path / "grown").same


def test_models_in_memory_are_converted_and_inspected(tmp_path):
    small = hf_models.model("qwen2", dtype=torch.bfloat16)
    seen = []
    ligo.convert(small, tmp_path / "universal", to="universal", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] > 0
    assert ligo.verify(tmp_path / "universal", small, values_only=True).same
    reader = ligo.open_state_dict(small.state_dict(), small.config)
    assert ligo.verify(reader, small).same
    summary = ligo.inspect(small)
    assert summary["dims"]["arch"] == "llama" and summary["parameters"] == small.num_parameters()
    assert ligo.grow(small, num_layers=3).dtype is torch.bfloat16
    assert ligo.grow(small, num_layers=3, dtype=torch.float32).dtype is torch.float32


def test_grown_models_keep_mode_and_generation(tmp_path):
    small = hf_models.model().train()
    small.generation_config.temperature = 0.5
    large = ligo.grow(small, num_layers=3)
    assert large.training and large.generation_config.temperature == 0.5
    large(input_ids=hf_models.tokens(), labels=hf_models.tokens()).loss.backward()


def test_refusals_are_those_of_the_commands(tmp_path):
    small = hf_models.model()
    with pytest.raises(ligo.ConfigError, match="Growth never shrinks"):
        ligo.grow(small, hidden_size=24)
    with pytest.raises(ligo.ConfigError, match="neither"):
        ligo.grow(small)
    with pytest.raises(ligo.ConfigError, match=r"operator\.niose"):
        ligo.grow(small, num_layers=3, settings={"operator.niose": 1.0})
    with pytest.raises(ligo.CheckpointError, match="module"):
        ligo.grow(torch.nn.DataParallel(small), num_layers=3)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(small.config)
    with pytest.raises(ligo.CheckpointError, match="meta device"):
        ligo.inspect(empty)
    small.config.attention_window_of_nobody = 3
    with pytest.raises(ligo.LigoError, match="attention_window_of_nobody"):
        ligo.inspect(small)
    assert ligo.inspect(small, accept=["attention_window_of_nobody"])["accepted"]
    with pytest.raises(ligo.DataError, match=r"train\.idx: expected a file, found none"):
        ligo.fit(hf_models.model(), {"num_layers": 3}, data=tmp_path / "train")
    with pytest.raises(ligo.ConfigError, match="manifest"):
        ligo.verify(hf_models.model())


SMALL = hf_models.model()
WRONG_ARGUMENTS = {
    "dtype": lambda folder: ligo.grow(SMALL, num_layers=3, dtype="bfloat"),
    "int64": lambda folder: ligo.convert(SMALL, folder / "x", to="hf", dtype=torch.int64),
    "settings": lambda folder: ligo.grow(SMALL, num_layers=3, settings=["operator.noise=1"]),
    "config": lambda folder: ligo.grow(SMALL, num_layers=3, config=3),
    "operator": lambda folder: ligo.grow(SMALL, operator=3),
    "tp": lambda folder: ligo.convert(SMALL, folder / "x", to="megatron", tp="2"),
    "pp": lambda folder: ligo.convert(SMALL, folder / "x", to="megatron", pp=True),
    "a config of transformers": lambda folder: ligo.fit(SMALL, 5, data=folder / "train"),
    "model.config": lambda folder: ligo.fit(SMALL, SMALL, data=folder / "train"),
    "data": lambda folder: ligo.fit(SMALL, {"num_layers": 3}, data=torch.zeros(2)),
    "valid": lambda folder: ligo.fit(SMALL, {"num_layers": 3}, data=folder / "train", valid=3),
    "world_size": lambda folder: ligo.plan(SMALL, num_layers=3, world_size=0),
    "device_memory": lambda folder: ligo.plan(SMALL, num_layers=3, device_memory="80GB"),
    "flops_per_second": lambda folder: ligo.plan(SMALL, num_layers=3, flops_per_second=float("inf")),
    "ligo.open_state_dict": lambda folder: ligo.grow(SMALL.state_dict(), num_layers=3),
}


@pytest.mark.parametrize("part", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_one_error_that_names_it(part, tmp_path):
    with pytest.raises(ligo.LigoError, match=rf"{re.escape(part)}.*") as error:
        WRONG_ARGUMENTS[part](tmp_path)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_every_function_reports_the_machine_as_our_error():
    """A future function that forgets the decorator fails here."""
    functions = {name: getattr(ligo, name) for name in ligo.__all__ if inspect.isfunction(getattr(ligo, name))}
    assert {"convert", "fit", "grow", "load_universal"} <= set(functions)
    assert not [name for name, function in functions.items() if not hasattr(function, "__wrapped__")]


# Calls that the operating system refuses, also for root. A folder in the place of a file, a file in that of a folder.
IMPOSSIBLE_PATHS = {
    "convert": lambda folder: ligo.convert(SMALL, "/proc/nobody/x", to="hf"),
    "convert below a file": lambda folder: ligo.convert(SMALL, folder / "file" / "x", to="mcore"),
    "write_handoff": lambda folder: ligo.write_handoff(SMALL, "/proc/nobody/x", num_layers=3),
    "write_handoff below a file": lambda folder: ligo.write_handoff(SMALL, folder / "file" / "x", num_layers=3),
    "plan's config": lambda folder: ligo.plan(SMALL, num_layers=3, config=folder),
    "grow's config": lambda folder: ligo.grow(SMALL, config=folder / "file" / "run.toml"),
    "inspect": lambda folder: ligo.inspect(folder / "file" / "x"),
    "open_model": lambda folder: ligo.open_model("x" * 5000),
    "verify": lambda folder: ligo.verify(SMALL, folder / "none"),
}


@pytest.mark.parametrize("call", IMPOSSIBLE_PATHS)
def test_a_path_that_the_system_refuses_is_our_error(call, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ligo.LigoError, match=r"expected .*, found"):
        IMPOSSIBLE_PATHS[call](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failure_of_the_machine_keeps_its_cause_and_a_bug_stays_itself(tmp_path, monkeypatch):
    def fail(error):
        def write(*_, **__):
            raise error

        return write

    full = OSError(errno.ENOSPC, "No space left on device", "x")
    with pytest.raises(ligo.MachineError, match="free space") as caught:
        ligo.convert(SMALL, tmp_path / "out", to="hf", progress=fail(full))
    assert caught.value.__cause__ is full
    for error in (KeyError("x"), ligo.DataError("x")):
        with pytest.raises(type(error)) as caught:
            ligo.convert(SMALL, tmp_path / "out", to="hf", progress=fail(error))
        assert caught.value is error
    monkeypatch.setattr("megatron_ligo.api.growing.build_model", fail(MemoryError()))
    with pytest.raises(ligo.MachineError, match="memory"):
        ligo.grow(SMALL, num_layers=3)


def test_dtypes_by_name():
    for name in ("bfloat16", "bf16"):
        assert ligo.grow(SMALL, num_layers=3, dtype=name).dtype is torch.bfloat16


def test_sizes_are_the_keys_of_large():
    assert list(LargeSizes.__annotations__) == [field.name for field in fields(LargeSection)]
    small = hf_models.model(num_key_value_heads=2)
    large = ligo.grow(small, num_layers=3, num_experts=3, top_k=2)
    assert large.config.model_type == "mixtral" and large.config.num_local_experts == 3
    with torch.no_grad():
        assert torch.allclose(small(hf_models.tokens())[0], large(hf_models.tokens())[0], atol=2e-5)
    with pytest.raises(ligo.ConfigError, match=r"large\.num_layer:.*num_layers"):
        ligo.grow(small, num_layer=3)


def test_a_plan_is_the_commands(tmp_path):
    hf_models.saved(tmp_path)
    plan = ligo.plan(tmp_path, **LLAMA, world_size=2, settings={"data.seq_length": 16, "fit.parallel.tp": 2})
    assert plan.fit.dp == 1 and "pretraining" in str(plan)
    layout = {"data.seq_length": 16, "fit.parallel.tp": 2}
    assert str(ligo.plan(hf_models.model(), **LLAMA, world_size=2, settings=layout)) == str(plan)


CHECKS = ("same", "moved", "groups end", "start", "start's loss", "fitted on", "norm_eps", "other config")


def fit_in_memory(folder: str) -> dict:
    """Returns what a fit of a model in memory gives, at the ranks of this case."""
    small = hf_models.model(hidden_size=48)
    large = ligo.grow(small, **LLAMA)
    rows = []
    options = {"data": f"{folder}/train", "steps": 2, "on_step": rows.append, "output": f"{folder}/fit"}
    settings = {
        "data.seq_length": 16,
        "fit.lr": 1e-2,
        "fit.global_batch_size": 2,
        "fit.eval_samples": 2,
        "fit.keep": "last",
    }
    mesh.forget_groups()
    operator = ligo.fit(small, large.config, **options, settings=settings)
    try:
        ligo.deepspeed_mpu()
    except ligo.LayoutError as error:
        groups_end = "initialize_model_parallel" in str(error)
    else:
        groups_end = False
    start = ligo.fit(small, LLAMA, **{**options, "steps": 0, "output": f"{folder}/start"}, settings=settings)
    again = ligo.fit(small, LLAMA, **options, settings=settings)
    fitted = ligo.grow(small, operator=operator)
    answer = {
        "rows": [(row["step"], row["loss"]) for row in rows],
        "same": all(torch.equal(operator.tensor(name), again.tensor(name)) for name in operator.shapes()),
        "moved": not ligo.verify(fitted, large).same,
        "groups end": groups_end,
        "start": ligo.verify(ligo.grow(small, operator=start), large).same,
        "start's loss": start.record["losses"]["start"] == start.record["losses"]["end"],
        "losses": operator.record["losses"],
    }
    for wrong, words in ((hf_models.model(seed=1), "fitted on"), (hf_models.model(rms_norm_eps=0.1), "norm_eps")):
        try:
            ligo.grow(wrong, operator=operator)
        except ligo.LigoError as error:
            answer[words] = words in str(error)
    wrong_config = transformers.LlamaConfig.from_dict({**large.config.to_dict(), "rms_norm_eps": 0.5})
    try:
        ligo.fit(small, wrong_config, **options, settings=settings)
    except ligo.ConfigError as error:
        answer["other config"] = "norm_eps" in str(error)
    return answer


def test_a_fit_of_a_model_in_memory(pools, tmp_path):
    make_pair(tmp_path / "train", 0)
    make_pair(tmp_path / "valid", 1)
    answer = pools(1).run(fit_in_memory, folder=str(tmp_path))
    assert [step for step, _ in answer["rows"]] == [1, 2] and answer["losses"]["end"] > 0
    assert all(answer[key] for key in CHECKS), answer

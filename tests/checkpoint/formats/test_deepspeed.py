"""DeepSpeed's engine and pipeline checkpoints as files. test_engine_checkpoints.py has real engines."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.testing.fuzz import engine_samples
from tests.checkpoint import hf_models

# Four groups of KV heads, so that tp 4 divides them; 37 rows of vocabulary, which no tp divides.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 48, "head_dim": 6, "num_hidden_layers": 3}
CASES = [("llama", False), ("llama", True), ("qwen2", False)]
LAYOUTS = [("deepspeed", 1, 1), ("deepspeed", 2, 1), ("deepspeed", 4, 1), ("pipeline", 1, 2), ("pipeline", 4, 2)]


@pytest.mark.parametrize("model_type, tied", CASES)
@pytest.mark.parametrize("to, tp, pp", LAYOUTS)
def test_round_trip_at_any_layout(tmp_path, to, tp, pp, model_type, tied):
    dtype = torch.bfloat16 if tp == 4 else torch.float32
    _, folder = hf_models.saved(tmp_path / "a", model_type, tied=tied, dtype=dtype, **SIZES)
    source = formats.open(folder)
    convert(source, tmp_path / "b", to, WriteOptions(tp=tp, pp=pp))
    reader = formats.open(tmp_path / "b")
    assert (reader.format, reader.layout["tp"], reader.layout["pp"]) == (to, tp, pp)
    hf_models.assert_same(source, reader)
    # From one layout to another.
    convert(reader, tmp_path / "c", "pipeline", WriteOptions(tp=2, pp=3))
    hf_models.assert_same(source, formats.open(tmp_path / "c"))


def test_tag_folder_is_read_and_any_tag_can_be_chosen(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    for to in ("deepspeed", "pipeline"):
        convert(formats.open(folder), tmp_path / to, to, WriteOptions(extra={"tag": "first"}))
        assert (tmp_path / to / "latest").read_text() == "first"
        for path in (tmp_path / to, tmp_path / to / "first"):
            reader = formats.open(path)
            assert reader.format == to
            hf_models.assert_same(formats.open(folder), reader)


def test_hugging_face_config_replaces_the_record(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "deepspeed")
    (tmp_path / "b" / "dims.json").unlink()
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "b", "deepspeed")
    assert "dims.json or config.json" in error.value.problems[0].expected
    (folder / "config.json").rename(tmp_path / "b" / "config.json")
    assert formats.open(tmp_path / "b").model_config.model_type == "llama"


def test_unsupported_layouts(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    cases = [
        ("deepspeed", {"tp": 4}, "tp = 4", "num_kv_heads = 2"),
        ("deepspeed", {"pp": 2}, "pp = 2", "2"),
        ("pipeline", {"pp": 3}, "pp = 3", "2 layers"),
    ]
    for to, layout, where, result in cases:
        with pytest.raises(ConfigError) as error:
            convert(source, tmp_path / "b", to, WriteOptions(**layout))
        assert (where, result) in [(problem.where, problem.found) for problem in error.value.problems]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(params=[1, 3])
def engine(request, tmp_path):
    """A bf16 model, and the checkpoint of an engine at TP 2, DP 2 and ZeRO 1 or 3 with it."""
    _, folder = hf_models.saved(tmp_path / "a", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "deepspeed", WriteOptions(tp=2))
    engine_samples.write_engine_files(tmp_path / "b" / "global_step0", request.param)
    return formats.open(folder), tmp_path / "b"


def test_masters_and_moments_from_flat_partitions(engine):
    source, folder = engine
    reader = formats.open(folder)
    # Adam's own step count, not the engine's.
    assert (reader.step, reader.has_moments) == (engine_samples.STEPS, True)
    for key in source.keys():  # noqa: SIM118 - no dict
        weight = source.read(key).float()
        assert hf_models.same_bits(reader.read(key), weight), key
        for kind, expected in engine_samples.adam_moments(weight).items():
            assert hf_models.same_bits(reader.read(key, kind), expected), (key, kind)


@pytest.mark.parametrize("engine", [1], indirect=True)
def test_reading_does_not_need_deepspeed(engine, tmp_path):
    """Optimizer states name DeepSpeed's classes, and are read without it."""
    _, folder = engine
    code = f"""
import sys
sys.modules["deepspeed"] = sys.modules["megatron"] = None
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
convert(formats.open({str(folder)!r}), {str(tmp_path / "c")!r}, "hf")
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert formats.open(tmp_path / "c").info("embed").dtype == torch.float32


def test_module_states_are_read_without_optimizer_files(engine):
    source, folder = engine
    for path in folder.rglob("*optim_states.pt"):
        path.unlink()
    if (folder / "global_step0" / "mp_rank_00_model_states.pt").exists():
        hf_models.assert_same(source, formats.open(folder))
    else:
        with pytest.raises(CheckpointError) as error:
            formats.open(folder)
        assert [problem.where for problem in error.value.problems] == ["optimizer states"]


def test_inspect_reports_layout_and_step(engine):
    _, folder = engine
    description = describe(formats.open(folder))
    assert description["layout"]["tp"] == description["layout"]["dp"] == 2
    assert description["layout"]["padded_vocab"] == 38
    assert (description["step"], description["moments"]) == (engine_samples.STEPS, True)


OLD_NAMES = {
    "embedding.": "language_model.embedding.",
    "decoder.": "language_model.encoder.",
    "output_layer.": "language_model.output_layer.",
    ".linear_qkv.": ".query_key_value.",
    ".linear_proj.": ".dense.",
    ".linear_fc1.": ".dense_h_to_4h.",
    ".linear_fc2.": ".dense_4h_to_h.",
    ".pre_mlp_layernorm.": ".post_attention_layernorm.",
}


def nest(module: dict[str, torch.Tensor]) -> dict:
    """Returns the model's state as Megatron-DeepSpeed saves it: embedding, encoder and head in dicts of their own."""
    nested: dict = {"language_model": {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}}
    model = nested["language_model"]
    for name, tensor in module.items():
        part, _, rest = name.removeprefix("language_model.").partition(".")
        if part == "embedding":
            model[part]["word_embeddings"][rest.removeprefix("word_embeddings.")] = tensor
        else:
            model[part][rest] = tensor
    return nested


@pytest.mark.parametrize("optimizer", [False, True], ids=["module", "optimizer"])
def test_names_of_megatron_deepspeed(tmp_path, optimizer):
    """Its module states are nested dicts of the names from before Megatron-core; ZeRO's shapes have them dotted."""
    _, folder = hf_models.saved(tmp_path / "a", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "deepspeed", WriteOptions(tp=2))
    tag = tmp_path / "b" / "global_step0"
    for path in tag.glob("mp_rank_*"):
        state, module = torch.load(path), {}
        for name, tensor in state["module"].items():
            # A dot before the layers' names, so that those of the model's parts begin with one too.
            for new, old in OLD_NAMES.items():
                name = f".{name}".replace(new if new[0] == "." else f".{new}", old if old[0] == "." else f".{old}")[1:]
            module[name] = tensor
        torch.save({**state, "module": module}, path)
    if optimizer:
        engine_samples.write_engine_files(tag, 1)
    for path in tag.glob("mp_rank_*"):
        state = torch.load(path)
        torch.save({**state, "module": nest(state["module"])}, path)
    reader, source = formats.open(tmp_path / "b"), formats.open(folder)
    assert (reader.model_config, reader.has_moments) == (source.model_config, optimizer)
    for key in source.keys():  # noqa: SIM118 - no dict
        weight = source.read(key)
        assert hf_models.same_bits(reader.read(key), weight.float() if optimizer else weight), key
        if optimizer:
            expected = engine_samples.adam_moments(weight.float())["exp_avg"]
            assert hf_models.same_bits(reader.read(key, "exp_avg"), expected), key


@pytest.mark.parametrize("model_type, tied", CASES)
def test_layers_of_megatron_deepspeeds_pipeline(tmp_path, model_type, tied):
    """Functions between its layers have numbers too: 0, 2 and that before the norm have no file."""
    _, folder = hf_models.saved(tmp_path / "a", model_type, tied=tied, **SIZES)
    convert(formats.open(folder), tmp_path / "b", "pipeline", WriteOptions(tp=2, pp=2))
    tag = tmp_path / "b" / "global_step0"
    numbers = {0: 1, 1: 3, 2: 4, 3: 5, 4: 7, 5: 8}
    for path in sorted(tag.glob("layer_*"), reverse=True):
        layer, rest = int(path.name[6:8]), path.name[8:]
        state = torch.load(path)
        for new, old in OLD_NAMES.items():
            if new[0] == ".":
                state = {f".{name}".replace(new, old)[1:]: tensor for name, tensor in state.items()}
        renamed = {4: ("norm.", ""), 5: ("linear.", "lm_head.")}
        old, new = renamed.get(layer, ("", ""))
        torch.save({new + name.removeprefix(old): tensor for name, tensor in state.items()}, path)
        path.rename(tag / f"layer_{numbers[layer]:02d}{rest}")
    reader = formats.open(tmp_path / "b")
    assert (reader.format, reader.layout["tp"]) == ("pipeline", 2)
    hf_models.assert_same(formats.open(folder), reader)
    (tag / "layer_04-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_04-model_01"):
        formats.open(tmp_path / "b")

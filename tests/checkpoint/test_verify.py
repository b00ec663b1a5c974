"""Comparison of checkpoints: differences and their size, manifests, logits, and the three commands."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.common import signal_handling
from megatron_ligo.experiments.reference_logits import compare_reference_logits
from tests.checkpoint import hf_models
from tests.checkpoint.formats.test_gguf import Kind, quantisable, write_gguf

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pair(tmp_path):
    """A folder and its copy as a universal checkpoint."""
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "universal")
    return folder, tmp_path / "b"


def edit(folder, name, change):
    state = load_file(folder / "model.safetensors")
    change(state[name])
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_equal_across_formats(pair):
    a, b = map(formats.open, pair)
    result = verify.compare(a, b)
    assert result.same
    assert result.compared == 21
    assert compare_reference_logits(a, b).difference == 0.0


def test_one_different_number_in_one_tensor(pair):
    edit(pair[0], "model.layers.1.self_attn.v_proj.weight", lambda tensor: tensor[3, 4].add_(0.5))
    result = verify.compare(*map(formats.open, pair))
    (line,) = result.differences
    assert line.startswith("layers.1.v: 1 of 960 numbers differ, largest difference 5.000e-01")
    assert compare_reference_logits(*map(formats.open, pair)).difference > 1e-3


def test_signs_of_zeros_and_nan_are_compared_as_bits(tmp_path):
    _, first = hf_models.saved(tmp_path / "a")
    _, second = hf_models.saved(tmp_path / "b")
    for folder, zero in ((first, 0.0), (second, -0.0)):
        edit(folder, "model.norm.weight", lambda tensor, zero=zero: tensor[:2].copy_(torch.tensor([zero, torch.nan])))
    assert verify.compare(formats.open(first), formats.open(first)).same
    assert len(verify.compare(formats.open(first), formats.open(second)).differences) == 1


def test_different_dtypes(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "hf", WriteOptions(dtype=torch.float32))
    a, b = formats.open(folder), formats.open(tmp_path / "b")
    assert len(verify.compare(a, b).differences) == 21
    assert verify.compare(a, b, values_only=True).same


def test_different_models(pair, tmp_path):
    _, other = hf_models.saved(tmp_path / "c", num_hidden_layers=3, rms_norm_eps=1e-4)
    differences = verify.compare(formats.open(pair[0]), formats.open(other)).differences
    assert "num_layers: 2 and 3" in differences
    assert "norm_eps: 0.001 and 0.0001" in differences
    assert "layers.2.q: only in the second" in differences


def test_a_manifest_detects_changes(pair):
    _, folder = pair
    assert verify.check_manifest(formats.open(folder)).same
    path = folder / "global_step0" / "zero" / "decoder.layers.0.mlp.linear_fc2.weight" / "fp32.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (folder / "latest_universal").write_text("global_step0\n")
    result = verify.check_manifest(formats.open(folder))
    assert len(result.differences) == 2
    # The file's own checksum differs. Of a file that was written anew only the manifest knows.
    assert "layers.0.down (weight)" in "".join(result.differences) and "checksum" in "".join(result.differences)
    assert "latest_universal: 12 bytes recorded, 13" in result.differences
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    state = torch.load(path)
    state["param"][0, 0] += 1
    torch.save(state, path)
    assert "layers.0.down (weight): digest" in "".join(verify.check_manifest(formats.open(folder)).differences)


def test_description(pair):
    summary = describe(formats.open(pair[1]))
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["format"], summary["step"], summary["moments"]) == ("universal", 0, True)
    rows = {row["key"]: row for row in summary["rows"]}
    assert rows["layers.0.o"] == {"key": "layers.0.o", "shape": [48, 60], "dtype": "float32", "split": 1}


@dataclass
class CommandResult:
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as its script does, but in this process: importing torch anew takes seconds."""
    # A process that had a process group would end here, with exit code 0.
    monkeypatch.setattr(signal_handling, "exit_process", sys.exit)

    def command(tool: str, *arguments: object) -> CommandResult:
        spec = spec_from_file_location(f"tool_{tool}", ROOT / "tools" / f"{tool}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as system_exit:
            cli.run_command(module.main)
        return CommandResult(system_exit.value.code or 0, *capsys.readouterr())

    return command


def test_commands_from_gguf_to_universal(run, tmp_path):
    write_gguf(tmp_path / "model.gguf", quantisable(tmp_path / "hf"), Kind.Q8_0)
    (tmp_path / "hf" / "config.json").unlink()
    inspected = run("inspect_checkpoint", tmp_path / "model.gguf", "--json")
    assert inspected.code == 0, inspected.err
    assert json.loads(inspected.out)["dims"]["hidden_size"] == 96
    assert "layers.1.gate" in run("inspect_checkpoint", tmp_path / "model.gguf").out
    converted = run("convert", tmp_path / "model.gguf", tmp_path / "b", "--to", "universal")
    assert converted.code == 0, converted.err
    assert "21 tensors" in converted.out
    same = run("verify", tmp_path / "model.gguf", tmp_path / "b", "--logits")
    assert same.code == 0, same.err
    assert "logits: largest difference 0.000e+00" in same.out
    assert f"logits of {tmp_path / 'model.gguf'}: transformers, from the file's metadata" in same.out
    assert run("verify", tmp_path / "b").code == 0


def test_commands_exit_with_2_on_errors_and_1_on_differences(run, pair, tmp_path):
    a, b = pair
    edit(a, "model.norm.weight", lambda tensor: tensor[0].add_(1))
    differ = run("verify", a, b)
    assert differ.code == 1
    assert "final_norm: 1 of 48 numbers differ" in differ.out
    errors = {
        "nothing there": run("inspect_checkpoint", tmp_path / "none"),
        "Did you mean 'hf'": run("convert", a, tmp_path / "c", "--to", "hff"),
        "Did you mean 'bfloat16'": run("convert", a, tmp_path / "c", "--to", "hf", "--dtype", "bloat16"),
        "NAME=VALUE": run("convert", a, tmp_path / "c", "--to", "hf", "--option", "shard_bytes"),
        "--overwrite": run("convert", a, b, "--to", "hf"),
        "two checkpoints": run("verify", b, "--logits"),
    }
    for words, result in errors.items():
        assert result.code == 2, result.err
        assert words in result.err
        assert "Traceback" not in result.err
    for tool in ("inspect_checkpoint", "convert", "verify"):
        assert "example:" in run(tool, "--help").out


def test_logits_are_computed_by_each_side(run, pair, tmp_path):
    """A key that changes the function and no tensor shows in the logits, and the output says who computed them."""
    a, b = pair
    same = run("verify", a, b, "--logits")
    assert same.code == 0, same.err
    assert f"logits of {a}: transformers, from config.json" in same.out
    assert f"logits of {b}: this program's reading, run by transformers (universal has no reference here)" in same.out
    config = json.loads((a / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    (a / "config.json").write_text(json.dumps(config))
    assert run("verify", a, b, "--logits").code == 1


def test_megatrons_arguments_state_the_function(pair, tmp_path):
    """A GPTModel of the saved arguments gives the logits; one argument that leaves no tensor changes them."""
    a = formats.open(pair[0])
    convert(a, tmp_path / "c", "mcore")
    reader = formats.open(tmp_path / "c")
    logits = compare_reference_logits(a, reader)
    assert logits.difference < 1e-5 * logits.scale
    assert logits.origins[1] == "a GPTModel of Megatron-core, from the checkpoint's args"
    folder = str(tmp_path / "named_by_the_arguments")
    paths = {"config_logger_dir": folder, "save": folder, "tensorboard_dir": folder, "data_cache_path": folder}
    reader.run_arguments = {**reader.run_arguments, **paths, "no_rope_freq": 2}
    assert compare_reference_logits(a, reader).difference > 0.1
    assert not Path(folder).exists()
    reader.run_arguments = {**reader.run_arguments, "hidden_size": "x"}
    assert "Megatron-core does not build its args' model" in compare_reference_logits(a, reader).origins[1]


def test_a_lossless_growth_has_equal_logits(run, pair, tmp_path):
    """A layer that adds nothing, and rows of new tokens: other tensors, the same logits of the old tokens."""
    model = hf_models.model(num_hidden_layers=3, vocab_size=43)
    state, small = model.state_dict(), load_file(pair[0] / "model.safetensors")
    for name, tensor in small.items():
        state[name][: len(tensor)] = tensor
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.2.{name}.weight"].zero_()
    model.save_pretrained(tmp_path / "grown")
    result = run("verify", pair[0], tmp_path / "grown", "--logits")
    assert result.code == 0, result.out + result.err
    assert "num_layers: 2 and 3" in result.out and "37 logits a token" in result.out
    assert run("verify", pair[0], tmp_path / "grown").code == 1
    state["model.layers.2.mlp.down_proj.weight"][0, 0] = 1.0
    model.save_pretrained(tmp_path / "grown")
    assert run("verify", pair[0], tmp_path / "grown", "--logits").code == 1


def test_a_real_model_is_described_without_reading_it():
    file = hf_models.smollm2()
    start = time.process_time()
    describe(formats.open(file))
    assert time.process_time() - start < 5

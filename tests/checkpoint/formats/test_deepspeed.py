"""DeepSpeed's engine and pipeline checkpoints as files; test_engine_checkpoints.py has real engines."""

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
def test_there_and_back_at_any_layout(tmp_path, to, tp, pp, model_type, tied):
    dtype = torch.bfloat16 if tp == 4 else torch.float32
    _, folder = hf_models.saved(tmp_path / "a", model_type, tied=tied, dtype=dtype, **SIZES)
    source = formats.open(folder)
    convert(source, tmp_path / "b", to, WriteOptions(tp=tp, pp=pp))
    reader = formats.open(tmp_path / "b")
    assert (reader.format, reader.layout["tp"], reader.layout["pp"]) == (to, tp, pp)
    hf_models.assert_same(source, reader)
    # From one layout straight to another.
    convert(reader, tmp_path / "c", "pipeline", WriteOptions(tp=2, pp=3))
    hf_models.assert_same(source, formats.open(tmp_path / "c"))


def test_the_tag_alone_is_a_checkpoint_and_any_tag_can_be_chosen(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    for to in ("deepspeed", "pipeline"):
        convert(formats.open(folder), tmp_path / to, to, WriteOptions(extra={"tag": "first"}))
        assert (tmp_path / to / "latest").read_text() == "first"
        for path in (tmp_path / to, tmp_path / to / "first"):
            reader = formats.open(path)
            assert reader.format == to
            hf_models.assert_same(formats.open(folder), reader)


def test_a_config_of_transformers_gives_the_sizes(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "deepspeed")
    (tmp_path / "b" / "dims.json").unlink()
    with pytest.raises(CheckpointError, match=r"dims.json or config.json"):
        formats.open(tmp_path / "b", "deepspeed")
    (folder / "config.json").rename(tmp_path / "b" / "config.json")
    assert formats.open(tmp_path / "b").model_config.model_type == "llama"


def test_layouts_that_cannot_be(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    cases = [
        ("deepspeed", {"tp": 4}, "num_kv_heads"),
        ("deepspeed", {"pp": 2}, "named pipeline"),
        ("pipeline", {"pp": 3}, "a stage a layer"),
    ]
    for to, layout, words in cases:
        with pytest.raises(ConfigError, match=words):
            convert(source, tmp_path / "b", to, WriteOptions(**layout))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(params=[1, 3])
def engine(request, tmp_path):
    """The model in bf16, and what an engine at TP 2, DP 2 and some ZeRO stage would save of it."""
    _, folder = hf_models.saved(tmp_path / "a", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "deepspeed", WriteOptions(tp=2))
    engine_samples.write_engine_files(tmp_path / "b" / "global_step0", request.param)
    return formats.open(folder), tmp_path / "b"


def test_masters_and_moments_out_of_flat_tensors(engine):
    source, folder = engine
    reader = formats.open(folder)
    # Adam's own count, whatever the engine's.
    assert (reader.step, reader.has_moments) == (engine_samples.STEPS, True)
    for key in source.keys():  # noqa: SIM118 - no dict
        weight = source.read(key).float()
        assert hf_models.same_bits(reader.read(key), weight), key
        for kind, expected in engine_samples.adam_moments(weight).items():
            assert hf_models.same_bits(reader.read(key, kind), expected), (key, kind)


@pytest.mark.parametrize("engine", [1], indirect=True)
def test_no_deepspeed_is_needed(engine, tmp_path):
    """Optimizer states name DeepSpeed's classes; they are read where it is not installed."""
    _, folder = engine
    code = f"""
import sys
sys.modules["deepspeed"] = sys.modules["megatron"] = None
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
convert(formats.open({str(folder)!r}), {str(tmp_path / "c")!r}, "hf")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert formats.open(tmp_path / "c").info("embed").dtype == torch.float32


def test_without_optimizer_files_the_module_states_remain(engine):
    source, folder = engine
    for path in folder.rglob("*optim_states.pt"):
        path.unlink()
    if (folder / "global_step0" / "mp_rank_00_model_states.pt").exists():
        hf_models.assert_same(source, formats.open(folder))
    else:
        with pytest.raises(CheckpointError, match="optimizer states"):
            formats.open(folder)


def test_inspect_says_what_it_is(engine):
    _, folder = engine
    found = describe(formats.open(folder))
    assert found["layout"]["tp"] == found["layout"]["dp"] == 2
    assert found["layout"]["padded_vocab"] == 38
    assert (found["step"], found["moments"]) == (engine_samples.STEPS, True)

"""Checkpoints of real DeepSpeed engines: read at every ZeRO stage and layout, and written so that engines load them."""

from __future__ import annotations

import argparse
import shutil

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import zero_to_fp32

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.checkpoint.verify import compare
from tests.models.full import engine_cases, pretrain_cases
from tests.tiny_models import hf_llama, hf_name, llama_config

# world; what is trained; the layout that saves, and others that go on from it
RESUMED = [
    (1, {}, [{}]),
    (2, {"tied": True}, [{"tp": 2}, {"zero": 3}, {"pp": 2}]),
    (2, {}, [{"zero": 2}]),
    (2, {"tied": True}, [{"pp": 2}, {"tp": 2}]),
    (2, {"bf16": True}, [{"zero": 3}]),
    (2, {"bf16": True}, [{"tp": 2}]),
    (4, {"tied": True}, [{"tp": 2, "zero": 3}]),
    (4, {"qkv_bias": True, "model_type": "qwen2"}, [{"tp": 2, "pp": 2}, {"zero": 2}]),
    (4, {"bf16": True, "tied": True}, [{"pp": 2}]),
]


def model_config_of(bf16: bool = False, **changes):
    return llama_config(**{**pretrain_cases.SIZES, **changes})


@pytest.mark.parametrize("world, kind, layouts", RESUMED, ids=str)
def test_an_engine_goes_on_from_what_was_converted(pools, tmp_path, world, kind, layouts):
    bf16 = kind.get("bf16", False)
    case = {"folder": str(tmp_path), "model_config": model_config_of(**kind), "layouts": layouts, "bf16": bf16}
    result = pools(world).run(engine_cases.saved_and_resumed, **case)
    assert result["resumed"][0] == result["undisturbed"]
    for losses in result["resumed"][1:]:
        assert losses == pytest.approx(result["undisturbed"], rel=1e-5)
    engine = formats.open(tmp_path / "engine")
    assert (engine.step, engine.has_moments) == (engine_cases.BEFORE, True)
    assert engine.layout["zero"] == layouts[0].get("zero", 1)
    check_deepspeeds_own_converter(tmp_path)
    assert not convert(engine, tmp_path / "mcore", "mcore").left_behind
    again = compare(formats.open(tmp_path / "mcore"), engine)
    assert again.same
    assert again.compared == 3 * len(list(engine.keys()))


def check_deepspeeds_own_converter(folder) -> None:
    """It takes our models' checkpoints as they are, and makes of them what we do."""
    built = folder / "by_deepspeed" / "state"
    arguments = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(folder / "engine" / "state"), "output_folder": str(built)}
    ds_to_universal.main(argparse.Namespace(**paths, **arguments, inject_missing_state=False))
    shutil.copy(folder / "engine" / "dims.json", built.parent)
    read = formats.open(built.parent)
    settings = {(group["betas"], group["eps"]) for group in formats.open(folder / "engine").groups}
    assert settings == {(group["betas"], group["eps"]) for group in read.groups} == {((0.9, 0.95), 1e-8)}
    ours = formats.open(folder / "universal")
    assert settings == {(group["betas"], group["eps"]) for group in ours.groups}
    theirs = compare(ours, read)
    assert theirs.same, theirs.differences[:3]
    assert theirs.compared == 3 * len(list(read.keys()))


@pytest.mark.parametrize(
    "world, to, layout",
    [
        (2, "deepspeed", {"tp": 2}),
        (2, "deepspeed", {"zero": 2}),
        (4, "deepspeed", {"tp": 2, "zero": 2}),
        (2, "pipeline", {"pp": 2}),
        (4, "pipeline", {"tp": 2, "pp": 2}),
    ],
    ids=str,
)
def test_an_engine_loads_what_was_written(pools, tmp_path, world, to, layout):
    tied = layout.get("tp", 1) == 2
    model_config = pretrain_cases.sizes(tied)
    hf_llama(model_config).save_pretrained(tmp_path / "hf")
    options = WriteOptions(tp=layout.get("tp", 1), pp=layout.get("pp", 1))
    convert(formats.open(tmp_path / "hf"), tmp_path / "made", to, options)
    expected = [loss for loss, _ in pretrain_cases.reference(tied)]
    result = pools(world).run(
        engine_cases.module_only, folder=str(tmp_path / "made"), model_config=model_config, layout=layout
    )
    assert result == pytest.approx([expected[0], *expected[: engine_cases.AFTER]], rel=1e-5)


# Sizes of which no tensor's is a multiple of four numbers, at which `parameter_alignment` begins them.
ODD = {"hidden_size": 21, "ffn_size": 29, "num_heads": 3, "num_kv_heads": 3}
# Those whose shares of two ranks are multiples of eight numbers, as DeepSpeed's quantizer needs.
EVEN = {"hidden_size": 32, "ffn_size": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "vocab_size": 40}
ZERO_OPTIONS = [
    (2, {}),
    (3, {}),
    (1, {"parameter_alignment": True}),
    (2, {"parameter_alignment": True, "round_robin_gradients": True}),
    (1, {"elastic_checkpoint": True}),
    (3, {"zero_quantized_weights": True}),
]


@pytest.mark.parametrize("zero, options", ZERO_OPTIONS, ids=str)
def test_a_model_of_transformers_in_an_engine(pools, tmp_path, zero, options):
    own = ODD if "parameter_alignment" in options else EVEN if "zero_quantized_weights" in options else {}
    model_config = model_config_of(**{"tied": zero == 2, **own})
    case = {"folder": str(tmp_path), "model_config": model_config, "zero": zero, "zero_options": options}
    pools(2).run(engine_cases.transformers_model, **case)
    truth = torch.load(tmp_path / "truth.pt", weights_only=True)
    reader = formats.open(tmp_path)
    assert (reader.format, reader.step) == ("deepspeed", engine_cases.BEFORE)
    for key in reader.keys():  # noqa: SIM118 - no dict
        for kind, expected in zip((WEIGHT, *MOMENTS), truth[hf_name(reader.arch, key)], strict=True):
            assert torch.equal(reader.read(key, kind), expected), (key, kind)


# zero; what is frozen; the modules around the model; bf16
PARTLY_TRAINED = [
    (1, "layers.0.", (), False),
    (2, "embed", ("module",), True),
    (3, "layers.0.", ("_orig_mod", "module"), False),
    (3, "embed", (), True),
]


@pytest.mark.parametrize("zero, frozen, wrappers, bf16", PARTLY_TRAINED, ids=str)
def test_frozen_parameters_and_wrapped_models(pools, tmp_path, zero, frozen, wrappers, bf16):
    """Every weight is the one that DeepSpeed's own tool recovers. That moments are not read, as some lack, is said."""
    folder = tmp_path / "engine"
    case = {"zero": zero, "frozen": frozen, "wrappers": wrappers, "bf16": bf16}
    pools(2).run(engine_cases.transformers_model, folder=str(folder), model_config=model_config_of(), **case)
    if zero == 1:
        # DeepSpeed records frozen parameters from ZeRO 2 on; the module states hold them.
        states = torch.load(folder / "global_step2" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        expected = {**states, **zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder))}
    else:
        expected = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    reader = formats.open(folder)
    prefix = "".join(f"{name}." for name in reversed(wrappers))
    dtypes = set()
    for key in reader.keys():  # noqa: SIM118 - no dict
        name = hf_name(reader.arch, key)
        assert torch.equal(reader.read(key), expected[prefix + name]), key
        assert reader.info(key).dtype == expected[prefix + name].dtype
        dtypes.add((reader.info(key).dtype, frozen in name))
    assert dtypes == {(torch.bfloat16 if bf16 else torch.float32, True), (torch.float32, False)}
    assert not reader.has_moments and "frozen" in reader.unread[0]
    outcome = convert(reader, tmp_path / "converted", "universal")
    assert any("Adam's state" in line for line in outcome.left_behind)

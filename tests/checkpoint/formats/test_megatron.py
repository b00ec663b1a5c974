"""Megatron-core's distributed checkpoints and Megatron-LM's by rank, exchanged with GPTModels of Megatron-core."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.inspect import describe, to_text
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.testing.fuzz import engine_samples
from tests import layer_norm_models
from tests.checkpoint import hf_models
from tests.checkpoint.formats import megatron_optimizers, megatron_ranks
from tests.tiny_models import tokens

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 56}
# The run's arguments describe every size, so that the cases differ only in what they also describe, and in dtype.
CASES = {
    "untied": ("llama", {}),
    "tied": ("llama", {"tied": True}),
    "biased": ("qwen2", {"tied": True}),
    "bf16": ("llama", {"dtype": torch.bfloat16}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Hugging Face folder for each case."""
    root = tmp_path_factory.mktemp("sources")
    folders = {
        name: hf_models.saved(root / name, kind, **SIZES, **changes)[1] for name, (kind, changes) in CASES.items()
    }
    return {**folders, "gpt2": layer_norm_models.saved(root / "gpt2", "gpt2", "GPT2LMHeadModel", n_layer=4)[1]}


def expected_logits(folder):
    reader = formats.open(folder)
    return verify.compute_logits(reader, tokens(reader.model_config))


def assert_same_weights(reader, source) -> None:
    assert list(reader.keys()) == list(source.keys())
    for key in source.keys():  # noqa: SIM118 - no dict
        assert hf_models.same_bits(reader.read(key), source.read(key)), key


def assert_same_state(reader, source) -> None:
    for key, kind in itertools.product(source.keys(), (WEIGHT, *MOMENTS)):
        assert hf_models.same_bits(reader.read(key, kind), source.read(key, kind)), (key, kind)


def assert_stepped(reader, source, weights: bool) -> None:
    """The moments after one step of AdamW, and (`weights`) the weights. (Without masters the model's may be others.)"""
    for key in source.keys():  # noqa: SIM118 - no dict
        weight = source.read(key).float().requires_grad_()
        weight.grad = megatron_optimizers.gradient(weight.detach())
        stepper = torch.optim.AdamW([weight], lr=megatron_optimizers.LR, weight_decay=0.0)
        stepper.step()
        if weights:
            torch.testing.assert_close(reader.read(key), weight.detach())
        for kind in MOMENTS:
            torch.testing.assert_close(reader.read(key, kind), stepper.state[weight][kind])


def assert_logits(actual, sources, names) -> None:
    for name, logits in zip(names, actual, strict=True):
        if logits is not None:
            assert (logits - expected_logits(sources[name])).abs().max() < 5e-5


def test_megatron_core_loads_our_distributed_checkpoints(pools, sources, tmp_path):
    """At any layout, from an unpadded vocabulary."""
    for name, folder in sources.items():
        convert(formats.open(folder), tmp_path / name, "mcore")
    cases = [("tied", 2, 2), ("untied", 4, 1), ("biased", 1, 4), ("bf16", 2, 1), ("gpt2", 2, 2)]
    jobs = [(str(tmp_path / name / "release"), str(sources[name]), tp, pp) for name, tp, pp in cases]
    logits = pools(4).run(megatron_ranks.load_distributed, jobs=jobs)
    assert_logits(logits, sources, [name for name, _, _ in cases])
    jobs = [(str(tmp_path / "tied" / "release"), str(sources["tied"]), 1, 1)]
    assert_logits(pools(1).run(megatron_ranks.load_distributed, jobs=jobs), sources, ["tied"])


def test_megatron_core_loads_our_rank_files(pools, sources, tmp_path):
    cases = [("tied", 2, 2), ("untied", 4, 1), ("biased", 1, 4), ("bf16", 2, 1), ("untied", 1, 2)]
    jobs = []
    for name, tp, pp in cases:
        target = tmp_path / f"{name}{tp}{pp}"
        convert(formats.open(sources[name]), target, "megatron", WriteOptions(tp=tp, pp=pp))
        jobs.append((str(target / "release"), str(sources[name]), tp, pp))
    logits = pools(4).run(megatron_ranks.load_by_rank, jobs=jobs)
    assert_logits(logits, sources, [name for name, _, _ in cases])


def test_distributed_checkpoints_of_megatron_core_are_read(pools, sources, tmp_path):
    """With stacked layers, with separate layers, and with separate gate and up projections."""
    cases = {
        "stacked": ("tied", 2, 2, {}),
        "alone": ("untied", 4, 1, {"singleton_local_shards": True}),
        "unstacked": ("biased", 1, 4, {"non_homogeneous_layers": True}),
        "bf16": ("bf16", 2, 1, {}),
    }
    jobs = [(str(tmp_path / name), str(sources[of]), tp, pp, how) for name, (of, tp, pp, how) in cases.items()]
    pools(4).run(megatron_ranks.save_distributed, jobs=jobs)
    for name, (of, *_) in cases.items():
        reader, source = formats.open(tmp_path / name), formats.open(sources[of])
        assert (reader.format, reader.step, reader.unread) == ("mcore", 5, ())
        assert reader.model_config == source.model_config
        assert reader.layout == {"padded_vocab": megatron_ranks.PADDED_VOCAB_SIZE}
        assert_same_weights(reader, source)
        convert(reader, tmp_path / "back" / name, "hf")
        hf_models.assert_same(formats.open(tmp_path / "back" / name), source)


@pytest.mark.parametrize(
    ("of", "tp", "pp", "sharding"),
    [
        ("bf16", 2, 2, "fully_reshardable"),
        ("bf16", 2, 1, None),
        ("tied", 1, 2, None),
        ("untied", 1, 2, "dp_reshardable"),
    ],
)
def test_distributed_optimizer_states_are_read(pools, sources, tmp_path, of, tp, pp, sharding):
    """With fp32 master weights where saved. States not keyed by parameter are reported as unread."""
    folder, bf16 = tmp_path / "run", of == "bf16"
    job = {"path": str(sources[of]), "tp": tp, "pp": pp, "bf16": bf16, "sharding": sharding}
    pools(4).run(megatron_optimizers.save_with_optimizer, folder=str(folder), **job)
    reader, source = formats.open(folder), formats.open(sources[of])
    if sharding == "dp_reshardable":
        assert not reader.has_moments
        assert convert(reader, tmp_path / "back", "universal").left_behind == list(reader.unread)
        assert "optimizer state" in reader.unread[0]
        return
    assert (reader.has_moments, reader.step, reader.unread) == (True, 1, ())
    assert_stepped(reader, source, bf16 or sharding is not None)
    convert(reader, tmp_path / "back", "universal")
    assert formats.open(tmp_path / "back").step == 1


def test_optimizers_of_megatron_core_load_our_checkpoints(pools, sources, tmp_path):
    """Distributed checkpoints into optimizers of both kinds, rank files into those that are not distributed."""
    rates = {"max_lr": megatron_optimizers.LR, "min_lr": megatron_optimizers.MIN_LR}
    for name in ("tied", "biased", "gpt2"):
        convert(formats.open(sources[name]), tmp_path / name / "engine", "deepspeed", WriteOptions(tp=2))
        engine_samples.write_engine_files(tmp_path / name / "engine" / "global_step0", 1)
    # A universal checkpoint keeps the settings of the param groups.
    convert(formats.open(tmp_path / "biased" / "engine"), tmp_path / "universal", "universal")
    for name, stored in (("tied", "tied/engine"), ("biased", "universal")):
        source = formats.open(tmp_path / stored)
        built = convert(source, tmp_path / name / "made", "mcore", WriteOptions(extra=rates))
        reader = formats.open(tmp_path / name / "made")
        assert (built.left_behind, reader.has_moments, reader.step) == ([], True, engine_samples.STEPS)
        assert_same_state(reader, source)
    cases = [("tied", 2, 2, False, False), ("biased", 1, 2, False, True), ("tied", 2, 1, True, True)]
    jobs = [(str(tmp_path / name / "made/release"), str(tmp_path / name / "engine"), *how) for name, *how in cases]
    pools(4).run(megatron_optimizers.load_with_optimizer, jobs=jobs)
    jobs = []
    for name, tp, pp, bf16 in (("tied", 2, 2, False), ("gpt2", 1, 2, True), ("biased", 2, 1, True)):
        source, folder = formats.open(tmp_path / name / "engine"), tmp_path / f"{name} by rank"
        if name == "biased":
            source = formats.open(tmp_path / "universal")
        built = convert(source, folder, "megatron", WriteOptions(tp=tp, pp=pp, extra=rates))
        reader = formats.open(folder)
        assert (built.left_behind, reader.has_moments, reader.step) == ([], True, engine_samples.STEPS)
        assert_same_state(reader, source)
        jobs.append((str(folder / "release"), str(tmp_path / name / "engine"), tp, pp, bf16))
    pools(4).run(megatron_optimizers.load_by_rank, jobs=jobs)


@pytest.mark.parametrize(("of", "tp", "pp"), [("tied", 2, 2), ("bf16", 1, 2), ("biased", 2, 1)])
def test_rank_files_of_megatron_core_are_read(pools, sources, tmp_path, of, tp, pp):
    """With optimizer states by parameter number, and fp32 master weights where saved."""
    folder, bf16 = tmp_path / "run" / "iter_0000012", of == "bf16"
    job = {"path": str(sources[of]), "tp": tp, "pp": pp, "bf16": bf16}
    pools(tp * pp).run(megatron_optimizers.save_by_rank, folder=str(folder), **job)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12")
    reader, source = formats.open(tmp_path / "run"), formats.open(sources[of])
    assert (reader.format, reader.has_moments, reader.step, reader.unread) == ("megatron", True, 1, ())
    assert reader.layout == {"tp": tp, "pp": pp, "padded_vocab": megatron_ranks.PADDED_VOCAB_SIZE}
    assert reader.model_config == source.model_config
    assert_stepped(reader, source, weights=True)
    built = convert(reader, tmp_path / "back", "mcore")
    assert (built.left_behind, built.step) == ([], 1)
    for file in folder.rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        torch.save({**state, "optimizer": {"optimizer": {"param_groups": []}}}, file)
        torch.save({}, file.with_name("distrib_optim.pt"))
    reader = formats.open(tmp_path / "run")
    assert (reader.has_moments, reader.step) == (False, 12)
    assert "distributed" in to_text(describe(reader))
    built = convert(reader, tmp_path / "hf", "hf")
    assert built.left_behind == list(reader.unread)
    assert_same_weights(formats.open(folder), source)


@pytest.mark.parametrize("of", list(CASES))
def test_round_trip(sources, tmp_path, of):
    """Through several layouts and vocabulary paddings in turn."""
    steps = [
        ("mcore", WriteOptions()),
        ("megatron", WriteOptions(tp=2, pp=2, extra={"layers": "te"})),
        ("mcore", WriteOptions(extra={"vocab_divisible_by": 64})),
        ("megatron", WriteOptions(tp=4, extra={"vocab_divisible_by": 1})),
        ("universal", WriteOptions()),
        ("megatron", WriteOptions(pp=4)),
    ]
    source = formats.open(sources[of])
    reader = source
    for number, (to, options) in enumerate(steps):
        convert(reader, tmp_path / f"{number}", to, options)
        reader = formats.open(tmp_path / f"{number}")
        if to == "universal":
            # It stores fp32 only.
            assert reader.model_config == source.model_config
            reader = formats.open(tmp_path / f"{number - 1}")
        hf_models.assert_same(reader, source)
    assert verify.check_manifest(formats.open(tmp_path / "2")).same


def test_unsupported_layouts_and_options(sources, tmp_path):
    source = formats.open(sources["tied"])
    for layout, where in (({"tp": 3}, "tp = 3"), ({"pp": 5}, "pp = 5")):
        with pytest.raises(ConfigError) as error:
            convert(source, tmp_path / "a", "megatron", WriteOptions(**layout))
        assert where in [problem.where for problem in error.value.problems]


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_encoder_over_stages(tmp_path, name):
    """Without a head, the last stage has no copy of the embedding."""
    _, folder = layer_norm_models.saved(tmp_path / "hf", "bert", name)
    source = formats.open(folder)
    convert(source, tmp_path / "megatron", "megatron", WriteOptions(tp=2, pp=2))
    assert_same_weights(formats.open(tmp_path / "megatron"), source)

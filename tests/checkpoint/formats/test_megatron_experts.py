"""Mixtral and Qwen3-MoE in Megatron's files, exchanged with GPTModels of Megatron-core that have experts."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.formats.megatron_lm.expert_files import UNCHAINED
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import CheckpointError, ConfigError
from tests.checkpoint import hf_models
from tests.checkpoint.formats import expert_ranks, megatron_optimizers
from tests.checkpoint.formats.megatron_ranks import PADDED_VOCAB_SIZE
from tests.tiny_models import tokens

COMMON = {
    "vocab_size": 37, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 10, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_theta": 5000.0,
    "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "mixtral": transformers.MixtralConfig(**COMMON, intermediate_size=28, num_local_experts=6),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=20, num_experts=4, shared_expert_intermediate_size=28, norm_topk_prob=True
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=20, num_experts=4, norm_topk_prob=False, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Hugging Face folder for each family."""
    root = tmp_path_factory.mktemp("experts")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.uniform_(0.5, 1.5) if "norm" in key else parameter.normal_(0, 0.15)
        model.save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def expected_logits(folder):
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).eval()
    with torch.no_grad():
        return model(tokens(formats.open(folder).model_config)).logits


def test_megatron_core_loads_our_distributed_experts(pools, sources, tmp_path):
    """One by one and as a grouped product, over tensor- and expert-parallel ranks."""
    for name, folder in sources.items():
        convert(formats.open(folder), tmp_path / name, "mcore")
        back = formats.open(tmp_path / name)
        assert verify.compare(back, formats.open(folder)).same
    layouts = [("mixtral", 2, 2, False), ("qwen3_moe", 1, 4, expert_ranks.HAS_GROUPED)]
    jobs = [(str(tmp_path / name / "release"), str(sources[name]), *how) for name, *how in layouts]
    for (name, *_), logits in zip(layouts, pools(4).run(expert_ranks.load_experts, jobs=jobs), strict=True):
        if logits is not None:
            assert (logits - expected_logits(sources[name])).abs().max() < 5e-5


def test_distributed_experts_of_megatron_core_are_read(pools, sources, tmp_path):
    """Stacked, each alone, with separate layers; from the run's arguments alone."""
    cases = {
        "stacked": ("mixtral", 2, 2, False, {}),
        "alone": ("qwen3_moe", 2, 2, expert_ranks.HAS_GROUPED, {"singleton_local_shards": True}),
        "layers": ("qwen3_moe", 1, 4, False, {"non_homogeneous_layers": True}),
    }
    jobs = [(str(tmp_path / name), str(sources[of]), *how) for name, (of, *how) in cases.items()]
    pools(4).run(expert_ranks.save_experts, jobs=jobs)
    for name, (of, *_) in cases.items():
        reader, source = formats.open(tmp_path / name), formats.open(sources[of])
        assert reader.format == "mcore"
        hf_models.assert_same(reader, source)


def test_megatron_core_loads_our_rank_files_of_experts(pools, sources, tmp_path):
    layouts = {"mixtral": (2, 2), "qwen3_moe": (1, 4), "qwen2_moe": (2, 2)}
    jobs = []
    for name, (tp, ep) in layouts.items():
        extra = {"ep": ep, "vocab_divisible_by": PADDED_VOCAB_SIZE // tp}
        convert(formats.open(sources[name]), tmp_path / name, "megatron", WriteOptions(tp=tp, extra=extra))
        jobs.append((str(tmp_path / name / "release"), str(sources[name]), tp, ep, False))
        reader = formats.open(tmp_path / name)
        assert {axis: reader.layout.get(axis) for axis in ("tp", "pp", "ep")} == {"tp": tp, "pp": 1, "ep": ep}
        hf_models.assert_same(reader, formats.open(sources[name]))
    for (name, _), logits in zip(layouts.items(), pools(4).run(expert_ranks.load_experts, jobs=jobs), strict=True):
        assert (logits - expected_logits(sources[name])).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("of", "options"),
    [
        ("mixtral", {"ep": 3, "layers": "te", "grouped_gemm": True}),
        ("qwen3_moe", {"ep": 2, "layers": "te"}),
        ("qwen2_moe", {"ep": 2}),
        ("mixtral", {}),
    ],
)
def test_rank_files_of_experts_round_trip(sources, tmp_path, of, options):
    """From the run's arguments alone; joined weights of the package grouped_gemm are read too."""
    source = formats.open(sources[of])
    convert(source, tmp_path / "made", "megatron", WriteOptions(tp=2, pp=2, extra=options))
    (tmp_path / "made" / "dims.json").unlink()
    hf_models.assert_same(formats.open(tmp_path / "made"), source)
    if not options:
        for file in (tmp_path / "made").rglob("*.pt"):
            join_experts(file)
        hf_models.assert_same(formats.open(tmp_path / "made"), source)


def test_moments_of_expert_parallel_ranks_are_exchanged(pools, sources, tmp_path):
    """Megatron-core chains an optimizer of a rank's experts after one of the rest."""
    path, saved, converted = sources["mixtral"], tmp_path / "saved", tmp_path / "converted"
    pools(4).run(expert_ranks.save_with_optimizers, folder=str(saved), path=str(path), tp=2, ep=2)
    reader, source = formats.open(saved), formats.open(path)
    assert (reader.has_moments, reader.step) == (True, 1)
    for key in source.keys():  # noqa: SIM118
        weight = torch.nn.Parameter(source.read(key).float())
        weight.grad = megatron_optimizers.gradient(weight.detach())
        stepper = torch.optim.AdamW([weight], lr=megatron_optimizers.LR, weight_decay=0.0)
        stepper.step()
        for kind in MOMENTS:
            assert torch.allclose(reader.read(key, kind), stepper.state[weight][kind], rtol=1e-6, atol=1e-9), key
        assert torch.allclose(reader.read(key), weight.detach(), rtol=1e-6, atol=1e-8), key
    rates = {"max_lr": megatron_optimizers.LR, "min_lr": megatron_optimizers.MIN_LR}
    extra = {"ep": 2, "vocab_divisible_by": PADDED_VOCAB_SIZE // 2, **rates}
    convert(reader, converted, "megatron", WriteOptions(tp=2, extra=extra))
    hf_models.assert_same(formats.open(converted), reader)
    for key in source.keys():  # noqa: SIM118
        assert torch.equal(formats.open(converted).read(key, MOMENTS[0]), reader.read(key, MOMENTS[0])), key
    pools(4).run(expert_ranks.load_optimizers, folder=str(converted / "release"), path=str(saved), tp=2, ep=2)
    convert(reader, tmp_path / "more", "megatron", WriteOptions(extra={"ep": 3, **rates}))
    assert formats.open(tmp_path / "more").has_moments
    file = converted / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["optimizer"][0]["state"][0]["exp_avg"] += 1
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="first expert-parallel rank"):
        formats.open(converted)
    state["optimizer"] = state["optimizer"][0]
    torch.save(state, file)
    assert formats.open(converted).unread == (f"optimizer state ({UNCHAINED})",)


def join_experts(file) -> None:
    """Replaces a file's experts by weight1 and weight2, as --moe-use-legacy-grouped-gemm has them."""
    state = torch.load(file, weights_only=False)
    model = state["model"]
    for prefix in {name.partition("local_experts.")[0] for name in model if "local_experts." in name}:
        parts = [
            [model[f"{prefix}local_experts.{n}.linear_fc{number}.weight"].T for n in range(6)] for number in (1, 2)
        ]
        model |= {f"{prefix}weight1": torch.stack(parts[0]).reshape(48, -1), f"{prefix}weight2": torch.cat(parts[1])}
    state["model"] = {name: value for name, value in model.items() if "local_experts." not in name}
    torch.save(state, file)


def test_layouts_of_experts_that_no_file_has_are_refused(sources, tmp_path):
    source = formats.open(sources["mixtral"])
    with pytest.raises(ConfigError, match="ep = 4"):
        convert(source, tmp_path / "uneven", "megatron", WriteOptions(extra={"ep": 4}))
    with pytest.raises(ConfigError, match="grouped_gemm"):
        convert(source, tmp_path / "local", "megatron", WriteOptions(extra={"grouped_gemm": True}))
    convert(source, tmp_path / "made", "megatron", WriteOptions(extra={"ep": 2}))
    file = tmp_path / "made" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    norm = next(name for name in state["model"] if "final_layernorm" in name)
    state["model"][norm] = state["model"][norm] + 1
    torch.save(state, file)
    with pytest.raises(CheckpointError, match="experts' ranks"):
        convert(formats.open(tmp_path / "made"), tmp_path / "back", "hf")
    state["args"].expert_tensor_parallel_size = 2
    first = file.parent.with_name("mp_rank_00_000") / file.name
    torch.save(torch.load(first, weights_only=False) | {"args": state["args"]}, first)
    with pytest.raises(CheckpointError, match="expert_tensor_parallel_size"):
        formats.open(tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_layer_freq", [0, 1]),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_shared_expert_gate", True),
        ("moe_router_enable_expert_bias", True),
        ("moe_router_topk_scaling_factor", 2.5),
    ],
)
def test_arguments_of_other_experts_are_refused(sources, tmp_path, name, value):
    convert(formats.open(sources["mixtral"]), tmp_path / "made", "megatron")
    file = tmp_path / "made" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    setattr(state["args"], name, value)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=name):
        formats.open(tmp_path / "made")

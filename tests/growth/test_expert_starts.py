"""Starts of experts against transformers' own OLMoE and Qwen2-MoE; what is random; Adam's moments."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_ligo.arch import get
from megatron_ligo.arch.spec import key_indices
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import ConfigError, LigoError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.checkpoint import hf_models
from tests.checkpoint.formats import expert_ranks
from tests.growth.test_adam_state import WithMoments, differentiate
from tests.tiny_models import llama_config

SIZES = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "olmoe": transformers.OlmoeConfig(**SIZES, intermediate_size=20, num_experts=3, num_experts_per_tok=2),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=20, shared_expert_intermediate_size=15, num_experts=3, num_experts_per_tok=2
    ),
    "one expert": transformers.Qwen2MoeConfig(
        **SIZES, moe_intermediate_size=20, shared_expert_intermediate_size=15, num_experts=1, num_experts_per_tok=1
    ),
    "mixtral": transformers.MixtralConfig(
        **SIZES, head_dim=4, intermediate_size=28, num_local_experts=3, num_experts_per_tok=2
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, intermediate_size=28),
}
WIDER = {"num_layers": 3, "hidden_size": 40, "num_heads": 8, "num_kv_heads": 4}
SHARED = OperatorSection(expert_start="shared")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in key else 0.0, 0.2)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def logits(folder) -> torch.Tensor:
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).eval()
    with torch.no_grad():
        return model(torch.arange(2 * 30).reshape(2, 30) * 7 % 37).logits


def grow(folder, settings=None, **sizes) -> GrownReader:
    small = formats.open(folder)
    return GrownReader(
        build_initial_operator(small.model_config, LargeSection(**sizes), settings or OperatorSection()), small
    )


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_families_are_converted_there_and_back(folders, tmp_path, family):
    source = formats.open(folders[family])
    convert(source, tmp_path / "mcore", "mcore")
    convert(formats.open(tmp_path / "mcore"), tmp_path / "hf", "hf")
    hf_models.assert_same(formats.open(tmp_path / "hf"), source)
    assert torch.equal(logits(folders[family]), logits(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("small", "settings", "sizes"),
    [
        # A softmax over all experts keeps the weight of copies that are chosen together.
        ("olmoe", None, {"num_experts": 9, "top_k": 6, "ffn_size": 7, "num_layers": 3}),
        ("qwen2_moe", None, {"num_experts": 6, "top_k": 4, "shared_expert_ffn_size": 21, **WIDER}),
        ("qwen2", None, {"num_experts": 9, "top_k": 6, "ffn_size": 10, "shared_expert_ffn_size": 12, **WIDER}),
        (
            "qwen2",
            SHARED,
            {"num_experts": 5, "top_k": 3, "ffn_size": 10, "renormalises_routing": False, **WIDER},
        ),
        # Its shared expert is its own, which a dense model's would not be.
        ("one expert", None, {"num_experts": 3, "top_k": 3, "shared_expert_ffn_size": 21, **WIDER}),
    ],
)
def test_logits_are_kept(folders, tmp_path, small, settings, sizes):
    convert(grow(folders[small], settings, **sizes), tmp_path / "grown", "hf")
    before, after = logits(folders[small]), logits(tmp_path / "grown")
    assert (before - after).abs().max() < 1e-5 * max(1, float(before.abs().max()))


def test_ties_between_shards_stay_together_when_they_grow_again(folders, tmp_path):
    """The shards of a copy have one router row, so that their scores are equal; all are chosen, or none."""
    convert(grow(folders["qwen2"], num_experts=6, top_k=3, ffn_size=10), tmp_path / "once", "hf")
    convert(grow(tmp_path / "once", num_experts=24, top_k=12, ffn_size=5, **WIDER), tmp_path / "twice", "hf")
    before, after = logits(folders["qwen2"]), logits(tmp_path / "twice")
    assert (before - after).abs().max() < 1e-5 * max(1, float(before.abs().max()))


@pytest.mark.parametrize(
    ("small", "sizes"),
    [
        ("mixtral", {"num_experts": 9, "top_k": 6}),
        ("qwen2_moe", {"num_experts": 6, "top_k": 4, "shared_expert_ffn_size": 21}),
        ("qwen2", {"num_experts": 9, "top_k": 6, "ffn_size": 10}),
    ],
)
def test_rows_of_copies_differ_by_noise_that_copies_of_features_cancel(folders, tmp_path, small, sizes):
    """Noise of each weight's own: no token sees it as long as the copies of a feature are equal, whatever is chosen."""
    settings = OperatorSection(noise=0.5, noise_draw="weight")
    grown = grow(folders[small], settings, **sizes, **WIDER)
    convert(grown, tmp_path / "grown", "hf")
    before, after = logits(folders[small]), logits(tmp_path / "grown")
    assert (before - after).abs().max() < 1e-5 * max(1, float(before.abs().max()))
    router, plain = (reader.read("layers.1.router") for reader in (grown, grow(folders[small], **sizes, **WIDER)))
    together = [(i, j) for i in range(len(plain)) for j in range(i) if torch.equal(plain[i], plain[j])]
    assert together
    for i, j in together:
        assert (router[i] - router[j]).norm() > 0.3 * plain[i].norm(), (i, j)
    # Where the width stays there is nothing to cancel it, and rows stay equal.
    same = grow(folders["mixtral"], settings, num_experts=6, top_k=4).read("layers.1.router")
    assert len({tuple(row.tolist()) for row in same}) == 3


@pytest.mark.parametrize(("noise", "others"), [(0.01, 0.024), (0.1, 0.21)])
def test_noise_that_tokens_see_cancels_away_from_ties_only(noise, others):
    """The same noise for the copies of each expert divides out of the softmax; but near a tie a copy is left behind.

    8 experts, top-2, each twice; noise relative to the rows. others: the share of the tokens that differ.
    """
    generator = torch.Generator().manual_seed(0)
    rows, drawn, tokens = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (8, 2, 20_000))
    scores, added = tokens @ rows.T / 8, noise * tokens @ drawn.T / 8
    expected = torch.zeros_like(scores).scatter(1, *reversed(scores.topk(2)))
    expected = torch.where(expected != 0, expected.exp(), 0)
    copies = scores[:, :, None] + added[:, None, :]
    top = copies.flatten(1).topk(4)
    weights = torch.zeros(len(tokens), 16, dtype=torch.float64).scatter(1, top.indices, top.values.softmax(1))
    gaps = (weights.unflatten(1, (8, 2)).sum(2) - expected / expected.sum(1, keepdim=True)).abs().amax(1)
    ordered = scores.sort(1, descending=True).values
    is_far = ordered[:, 1] - ordered[:, 2] > added.max(1).values - added.min(1).values
    assert gaps[is_far].max() < 1e-12 and gaps[~is_far].min() > 1e-3
    assert float((~is_far).double().mean()) == pytest.approx(others, rel=0.1)


def test_a_router_before_the_choice_is_refused_with_its_gap(folders):
    with pytest.raises(ConfigError, match=r"add up to about 0\.6 instead of 1"):
        grow(folders["qwen2"], num_experts=5, top_k=3, renormalises_routing=False)
    with pytest.raises(ConfigError, match="renormalises_routing"):
        grow(folders["qwen2_moe"], num_experts=6, top_k=4, renormalises_routing=True)
    with pytest.raises(ConfigError, match="the small model has experts"):
        grow(folders["one expert"], SHARED, num_experts=3, top_k=3)
    with pytest.raises(ConfigError, match=r"operator\.expert_drop"):
        grow(folders["qwen2"], OperatorSection(expert_start="shared", expert_drop=0.5), num_experts=3, top_k=2)
    with pytest.raises(ConfigError, match="has no shared expert"):
        build_initial_operator(llama_config(), LargeSection(num_experts=2, top_k=1), SHARED)
    with pytest.raises(ConfigError, match="mixtral knows no other"):
        build_initial_operator(
            llama_config(), LargeSection(num_experts=2, top_k=1, renormalises_routing=False), OperatorSection()
        )


def test_layers_without_experts_are_refused(folders):
    for key, value in {"decoder_sparse_step": 2, "mlp_only_layers": [0]}.items():
        config = CONFIGS["qwen2_moe"].to_dict() | {key: value}
        with pytest.raises(LigoError, match=key):
            config_json.parse_model_config(config, "config.json")


def test_dropped_neurons_are_drawn_by_seed_and_key(folders):
    """Each expert loses other neurons, the same of its three matrices; the others are the exact start's."""
    sizes = {"num_experts": 3, "top_k": 2}
    exact = grow(folders["qwen2"], **sizes)
    dropped, again, other = (
        grow(folders["qwen2"], OperatorSection(expert_drop=0.5, seed=seed), **sizes) for seed in (1, 1, 2)
    )
    lost = {}
    for expert in range(3):
        key = f"layers.1.experts.{expert}"
        rows = [(dropped.read(f"{key}.{part}") != exact.read(f"{key}.{part}")).any(1) for part in ("gate", "up")]
        columns = (dropped.read(f"{key}.down") != exact.read(f"{key}.down")).any(0)
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], columns) and columns.sum() == 14
        lost[expert] = columns
        assert torch.equal(dropped.read(f"{key}.up"), again.read(f"{key}.up"))
        assert not torch.equal(dropped.read(f"{key}.up"), other.read(f"{key}.up"))
    assert not torch.equal(lost[0], lost[1])


MIXTURES = {
    "copies": ("mixtral", {"num_experts": 9, "top_k": 6, **WIDER, "num_layers": 2}, None),
    "copies and shards": ("mixtral", {"num_experts": 12, "top_k": 8, "ffn_size": 14}, None),
    "shards of a dense block": ("qwen2", {"num_experts": 3, "top_k": 3, "ffn_size": 10}, None),
    "a shared expert": ("qwen2", {"num_experts": 3, "top_k": 2}, SHARED),
}


def canonical(named: dict, model_config) -> dict:
    """Returns gradients by canonical key, of a model of transformers, which holds a layer's experts as one tensor."""
    arch, result = get(model_config.arch), {}
    for key in arch.keys(model_config):
        param = arch.param(key)
        if not param.in_expert:
            name = param.locations["hf"].name.format(*key_indices(key))
            result[key] = named[name.replace("block_sparse_moe.", "mlp.")].grad
            continue
        layer, expert = key_indices(key)
        name, roles = next((name, roles) for name, roles in arch.fused_experts.items() if param.role in roles)
        result[key] = named[name.format(layer)].grad[expert].chunk(len(roles))[roles.index(param.role)]
    return result


def load_double(folder):
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).double()


@pytest.mark.parametrize("case", MIXTURES)
def test_moments_are_the_gradients_of_the_grown_model(folders, tmp_path, case):
    """Where all copies of a choice are chosen together. What is new starts at zero."""
    name, sizes, settings = MIXTURES[case]
    small = formats.open(folders[name])
    gradients = canonical(differentiate(load_double(folders[name]), small.model_config), small.model_config)
    tensors = {key: small.read(key) for key in small.keys()}  # noqa: SIM118 - no dict
    source = WithMoments(small.model_config, tensors, gradients)
    operator = build_initial_operator(small.model_config, LargeSection(**sizes), settings or OperatorSection())
    grown = GrownReader(operator, source, "grow")
    convert(GrownReader(operator, source), tmp_path / "grown", "hf")
    real = canonical(differentiate(load_double(tmp_path / "grown"), grown.model_config), grown.model_config)
    scale = max(float(gradient.abs().max()) for gradient in real.values())
    is_new = {
        "qwen2": ("router", "shared_weight", *(("experts",) if settings else ("shared",))),
        "mixtral": (),
    }[name]
    for key in grown.keys():  # noqa: SIM118 - no dict
        moment = grown.read(key, "exp_avg")
        if any(part in key for part in is_new):
            assert not moment.any(), key
            continue
        if key.endswith("router") and "ffn_size" in sizes:
            # Shards of one expert return different parts of its output: only the sum over its rows is known.
            moment, real[key] = (tensor.unflatten(0, (3, -1)).sum(1) for tensor in (moment, real[key]))
        assert moment.any() and (moment - real[key]).abs().max() < 1e-5 * scale, key
        squares = grown.read(key, "exp_avg_sq")
        assert torch.allclose(squares, grown.read(key, "exp_avg").square(), rtol=1e-4, atol=1e-12), key


UPCYCLED = {  # shards, copies, copies of a token, softmax before the choice: Megatron-core's relative error
    (3, 3, 2, False): 0.110,
    (4, 2, 1, False): 0.135,
    (8, 2, 1, False): 0.190,
    (4, 8, 1, True): 0.455,
}


@pytest.mark.parametrize(("shards", "error"), [(3, 0.11), (4, 0.14), (8, 0.20)])
def test_a_scale_within_the_silu_changes_a_block(shards, error):
    """Random weights and inputs of unit variance; the cube root of the shards on gate, up and down, or all on down."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((512, 64), (240, 64), (240, 64), (64, 240))
    inputs, gate, up, down = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    gate, up, down = gate / 8, up / 8, down / 240**0.5

    def block(gate_scale: float, up_scale: float, down_scale: float) -> torch.Tensor:
        hidden = torch.nn.functional.silu(inputs @ gate.T * gate_scale) * (inputs @ up.T * up_scale)
        # A token weighs each shard of a copy by 1 / shards.
        return hidden @ (down * down_scale).T / shards

    dense, root = block(1, 1, 1) * shards, shards ** (1 / 3)
    assert float((block(root, root, root) - dense).norm() / dense.norm()) == pytest.approx(error, rel=0.1)
    assert float((block(1, 1, shards) - dense).norm() / dense.norm()) < 1e-15


def test_megatron_cores_own_upcycling_is_not_lossless(pools, tmp_path):
    """Its scale on gate, up and down passes through the SiLU. The first block's output, in fp64."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES | {"hidden_size": 48, "num_hidden_layers": 1}, intermediate_size=192)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in key else parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "dense")
    errors = pools(1).run(expert_ranks.compare_upcycling, folder=str(tmp_path / "dense"), cases=list(UPCYCLED))
    for (theirs, ours), (case, expected) in zip(errors, UPCYCLED.items(), strict=True):
        assert theirs == pytest.approx(expected, rel=0.1), (case, errors)
        assert ours is None or ours < 1e-6, (case, errors)

"""Growth into experts against transformers' own Mixtral: dense to experts, experts to more and finer ones."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth import experts
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_llama, llama_config

LOSSLESS = OperatorSection()
WIDER = {"num_layers": 5, "hidden_size": 40, "num_heads": 8, "num_kv_heads": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of a tiny Llama with a feed-forward width of 28."""
    folder = tmp_path_factory.mktemp("dense")
    hf_llama(llama_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a tiny Mixtral: 3 experts of width 20, two for each token."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.2 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    return folder


def logits(folder) -> torch.Tensor:
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).eval()
    ids = torch.arange(2 * 30).reshape(2, 30) * 7 % 37
    with torch.no_grad():
        return model(ids).logits


def grow(folder, target, settings=LOSSLESS, **sizes) -> Reader:
    small = formats.open(folder)
    grown = GrownReader(build_initial_operator(small.model_config, LargeSection(**sizes), settings), small)
    convert(grown, target, "hf")
    return formats.open(target)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "top_k": 2},
        {"num_experts": 5, "top_k": 3, "ffn_size": 44, **WIDER},
        {"num_experts": 9, "top_k": 6, "ffn_size": 10, **WIDER},  # 3 copies in 3 shards of width 10
        {"num_experts": 8, "top_k": 4, "ffn_size": 14},
    ],
)
def test_a_dense_model_keeps_its_logits(dense, tmp_path, sizes):
    grown = grow(dense, tmp_path / "grown", **sizes)
    assert grown.model_config.num_experts == sizes["num_experts"]
    before, after = logits(dense), logits(tmp_path / "grown")
    assert 1 < before.abs().max() < 10
    assert (before - after).abs().max() < 1e-5


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 6, "top_k": 4},
        {"num_experts": 3, "top_k": 2, "ffn_size": 31, **WIDER},
        {"num_experts": 18, "top_k": 12, "ffn_size": 7, **WIDER},  # 2 copies in 3 shards
    ],
)
def test_a_mixture_keeps_its_logits(mixture, tmp_path, sizes):
    grow(mixture, tmp_path / "grown", **sizes)
    before, after = logits(mixture), logits(tmp_path / "grown")
    assert (before - after).abs().max() < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize(
    "sizes", [{"num_experts": 6, "top_k": 4, "ffn_size": 14}, {"num_experts": 3, "top_k": 2, **WIDER}]
)
def test_qwen3_grows_into_its_form_with_experts(tmp_path, sizes):
    """Its one eps for all norms costs about 1e-6."""
    torch.manual_seed(2)
    config = transformers.Qwen3Config(
        vocab_size=37, hidden_size=24, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(tmp_path / "small")
    grown = grow(tmp_path / "small", tmp_path / "grown", **sizes)
    assert grown.model_config.model_type == "qwen3_moe"
    before, after = logits(tmp_path / "small"), logits(tmp_path / "grown")
    assert (before - after).abs().max() < 1e-5 * max(1, float(before.abs().max()))


def test_scaling_down_alone_keeps_the_function(dense, tmp_path, monkeypatch):
    """A negative control: without the factor, or with rows of different shards' own, the logits differ."""
    sizes = {"num_experts": 8, "top_k": 4, "ffn_size": 14}
    monkeypatch.setattr(experts, "repeat_shards", lambda copies, shards: copies.repeat(shards, 1))
    grow(dense, tmp_path / "grown", **sizes)
    assert (logits(dense) - logits(tmp_path / "grown")).abs().max() > 0.1


def test_numbers_that_no_lossless_start_has_are_refused(dense, mixture, tmp_path):
    with pytest.raises(ConfigError, match=r"large\.num_experts: expected a multiple of 2"):
        grow(dense, tmp_path / "odd", num_experts=3, top_k=2, ffn_size=14)
    with pytest.raises(ConfigError, match=r"large\.top_k: expected a multiple of 2"):
        grow(dense, tmp_path / "half", num_experts=4, top_k=3, ffn_size=14)
    with pytest.raises(ConfigError, match=r"large\.top_k: expected 4"):
        grow(mixture, tmp_path / "few", num_experts=6, top_k=2)
    with pytest.raises(ConfigError, match="has no form with experts"):
        build_initial_operator(llama_config(arch="olmo2", model_type="olmo2"), LargeSection(num_experts=2), LOSSLESS)


def test_fused_experts_are_read_as_single_ones(mixture, tmp_path):
    """transformers 5 holds them so in memory, and mergekit writes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, fused / "model.safetensors")
    (fused / "config.json").write_bytes((mixture / "config.json").read_bytes())
    assert any("gate_up_proj" in name for name in model.state_dict())
    source, single = formats.open(fused), formats.open(mixture)
    assert all(torch.equal(source.read(key), single.read(key)) for key in single.keys())  # noqa: SIM118
    config = json.loads((mixture / "config.json").read_text())
    (fused / "config.json").write_text(json.dumps(config | {"num_local_experts": 2}))
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        formats.open(fused)


def test_a_mixture_is_converted_there_and_back(mixture, tmp_path):
    source = formats.open(mixture)
    convert(source, tmp_path / "copy", "hf")
    copy = formats.open(tmp_path / "copy")
    assert list(copy.keys()) == list(source.keys())
    assert all(torch.equal(copy.read(key), source.read(key)) for key in source.keys())  # noqa: SIM118
    assert torch.equal(logits(mixture), logits(tmp_path / "copy"))

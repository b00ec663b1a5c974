"""Tiny random decoders of Hugging Face's classes whose norms and factors differ from Llama's: sizes, and one config a
family. Models are built by layer_norm_models.model_of."""

from __future__ import annotations

from megatron_ligo.arch import get
from megatron_ligo.arch.model_config import ModelConfig

# All sizes differ. transformers wants hidden_size to be a multiple of num_heads in some families.
SIZES = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_size": 28,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 4,
    "vocab_size": 37,
    "max_positions": 64,
    "norm_eps": 1e-3,
    "rope_base": 10000.0,
}
# Fields of ModelConfig in which a family differs from Llama, with values that no default has.
OWN = {
    "qwen3": {},
    "granite": {
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.7,
        "attention_scale": 0.3,
        "logits_divisor": 2.0,
    },
    "olmo2": {},
    "gemma2": {
        "activation": "gelu_pytorch_tanh",
        "attention_scale_dim": 9,
        "attention_softcap": 2.0,
        "logits_softcap": 3.0,
        "sliding_window": 5,
        "window_layers": (True, False, True),
    },
}
# The growth of every size, none by a whole multiple, where a family's norms allow it.
RAGGED = {"num_layers": 5, "hidden_size": 32, "ffn_size": 44, "num_heads": 8, "num_kv_heads": 4}


def config_of(family: str, **changes) -> ModelConfig:
    """Returns the sizes of a tiny model. family: the name of the definition, which is its `model_type` too."""
    sizes = {"arch": family, "model_type": family, **SIZES, **OWN[family], **changes}
    if sizes.get("window_layers"):
        # Windows in every other layer, as transformers has them.
        sizes["window_layers"] = tuple(layer % 2 == 0 for layer in range(sizes["num_layers"]))
    return ModelConfig(**sizes)


def has_gguf(family: str) -> bool:
    """True if the keys of llama.cpp's files state all sizes of a family."""
    return bool(get(family).gguf_fields) and not get(family).gguf_network.window_period

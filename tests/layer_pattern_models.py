"""Tiny decoders whose layers differ in window or rotary positions, or whose files or positions differ from Llama's.

Models are built by layer_norm_models.model_of.
"""

from __future__ import annotations

from megatron_ligo.arch.model_config import LAYER_PATTERNS, ModelConfig
from tests.decoder_models import SIZES

ALL_BIASES = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)
# Name of a case: the fields of ModelConfig in which it differs.
OWN = {
    "smollm3": {"arch": "smollm3", "rope_layers": (True, False, True)},
    "smollm3 with windows": {
        "arch": "smollm3",
        "rope_layers": (False, True, True),
        "sliding_window": 5,
        "window_layers": (False, True, False),
    },
    "qwen2 with windows": {
        "arch": "llama",
        "model_type": "qwen2",
        "qkv_bias": True,
        "sliding_window": 5,
        "window_layers": (False, True, True),
    },
    "granite_swa": {
        "arch": "granite_swa",
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.7,
        "attention_scale": 0.3,
        "logits_divisor": 2.0,
        "sliding_window": 5,
        "window_layers": (False, True, True),
        "rope_layers": (True, True, False),
    },
    "phi3": {"arch": "phi3", "rotary_fraction": 0.5, "sliding_window": 5},
    "starcoder2": {"arch": "starcoder2", "activation": "gelu_pytorch_tanh", "sliding_window": 5, **ALL_BIASES},
    "arcee": {"arch": "arcee", "activation": "relu2", "mlp_bias": True},
    "llama with biases": {"arch": "llama", **ALL_BIASES},
    # Before the norms after the blocks, and of all heads; the feed-forward blocks have none.
    "olmo2 with biases": {"arch": "olmo2", "qkv_bias": True, "output_bias": True},
    "stablelm": {"arch": "stablelm", "rotary_fraction": 0.5, "qkv_bias": True},
    "olmo3": {
        "arch": "olmo3",
        "sliding_window": 5,
        "window_layers": (True, False, True),
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "window_rope_base": 10000.0,
    },
    "gemma3": {
        "arch": "gemma3",
        "model_type": "gemma3_text",
        "activation": "gelu_pytorch_tanh",
        "attention_scale_dim": 50,
        "logits_softcap": 3.0,
        "sliding_window": 5,
        "window_layers": (True, True, False),
        "window_rope_base": 100.0,
    },
    "modernbert": {
        "arch": "modernbert",
        "activation": "gelu",
        "sliding_window": 3,
        "window_layers": (False, True, True),
        "window_rope_base": 500.0,
        "head_bias": True,
    },
    "modernbert with biases": {
        "arch": "modernbert",
        "activation": "gelu",
        "sliding_window": 4,
        "window_layers": (False, True, False),
        "window_rope_base": 500.0,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "norm_bias", "head_transform_bias"), True),
    },
    "ministral3": {
        "arch": "ministral3",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
        "query_scaling_beta": 0.5,
    },
    "llama4_text": {
        "arch": "llama4_text",
        "attention_chunk": 5,
        "chunk_layers": (True, False, True),
        "rope_layers": (True, False, False),
        "l2_normalises_heads": True,
        "query_scaling_beta": 0.5,
        "query_scaling_length": 4,
    },
    "llama4_text with biases": {
        "arch": "llama4_text",
        "attention_chunk": 3,
        "rope_layers": (False, True, True),
        "query_scaling_length": 8,
        "qkv_bias": True,
        "output_bias": True,
    },
    "ernie4_5": {"arch": "ernie4_5"},
    "gemma": {"arch": "gemma", "activation": "gelu_pytorch_tanh"},
    "exaone4": {
        "arch": "exaone4",
        "sliding_window": 5,
        "window_layers": (True, False, True),
        "rope_layers": (True, False, True),
    },
    "cohere": {"arch": "cohere", "logits_multiplier": 0.7, "parallel_residual": True},
    "cohere with biases": {
        "arch": "cohere",
        "logits_multiplier": 1.3,
        "parallel_residual": True,
        "qkv_bias": True,
        "output_bias": True,
    },
    "cohere2": {
        "arch": "cohere2",
        "logits_multiplier": 0.7,
        "parallel_residual": True,
        "sliding_window": 5,
        "window_layers": (True, False, True),
        "rope_layers": (True, False, True),
    },
    "glm4": {"arch": "glm4", "rotary_fraction": 0.5, "qkv_bias": True},
    "nemotron": {"arch": "nemotron", "activation": "relu2", "rotary_fraction": 0.5, **ALL_BIASES},
    "seed_oss": {"arch": "seed_oss", "qkv_bias": True},
    "vaultgemma": {
        "arch": "vaultgemma",
        "activation": "gelu_pytorch_tanh",
        "attention_scale_dim": 9,
        "attention_softcap": 2.0,
        "sliding_window": 5,
        "window_layers": (True, False, True),
    },
    "phi": {"arch": "phi", "activation": "gelu_new", "rotary_fraction": 0.5, "parallel_residual": True},
    "falcon": {"arch": "falcon", "activation": "gelu", "parallel_residual": True},
    "falcon with two norms": {
        "arch": "falcon",
        "activation": "gelu",
        "parallel_residual": True,
        "num_parallel_norms": 2,
        **ALL_BIASES,
    },
    "opt": {
        "arch": "opt",
        "activation": "relu",
        "position_offset": 2,
        "norm_eps": 1e-5,
        "rope_base": None,
        "num_kv_heads": 6,
    },
}
# Layers that differ.
PATTERNS = (
    "smollm3", "smollm3 with windows", "qwen2 with windows", "olmo3", "gemma3", "exaone4", "modernbert", "granite_swa",
    "cohere2", "llama4_text", "llama4_text with biases",
)  # fmt: skip
# LayerNorms keep their mean and variance at whole multiples of hidden_size only.
RAGGED = {"num_layers": 5, "hidden_size": 32, "ffn_size": 44, "num_heads": 8, "num_kv_heads": 4}
DOUBLE = {"num_layers": 5, "hidden_size": 48, "ffn_size": 44, "num_heads": 12, "num_kv_heads": 6}
# Without grouped-query attention.
FULL_HEADS = ("opt", "modernbert")
WHOLE = ("starcoder2", "stablelm", "cohere", "cohere2", "nemotron", "phi", "falcon")
GROWTH = dict.fromkeys(OWN, RAGGED) | {case: DOUBLE for case in OWN if OWN[case]["arch"] in WHOLE}
GROWTH |= {case: {**DOUBLE, "num_kv_heads": 12} for case in OWN if OWN[case]["arch"] in FULL_HEADS}


def config_of(case: str, **changes) -> ModelConfig:
    """Returns the sizes of a tiny model. Patterns are repeated for more layers."""
    own = OWN[case]
    sizes = {"model_type": own["arch"], **SIZES, **own, **changes}
    for name in LAYER_PATTERNS:
        if name in own:
            sizes[name] = tuple(own[name][layer % 3] for layer in range(sizes["num_layers"]))
    if own["arch"] in FULL_HEADS:
        sizes["num_kv_heads"] = sizes["num_heads"]
    return ModelConfig(**sizes)

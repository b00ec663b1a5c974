"""Which linears of a layer have a bias, and whether Megatron-core's config can say so.

It adds biases to all linears, or to query, key and value alone.
"""

from __future__ import annotations

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role

# Whose bias each linear has, by Megatron-core's names.
LINEAR_ROLES = {
    "linear_qkv": Role.QUERY,
    "linear_proj": Role.ATTENTION_OUTPUT,
    "linear_fc1": Role.FFN_UP,
    "linear_fc2": Role.FFN_DOWN,
}


def linear_biases(model_config: ModelConfig) -> dict[str, bool]:
    """Returns which linears of a layer have a bias, by Megatron-core's names. Experts have none."""
    arch = architectures.get(model_config.arch)
    return {name: arch.has_bias(role, model_config) for name, role in LINEAR_ROLES.items()}


def has_common_biases(model_config: ModelConfig) -> bool:
    """True if Megatron-core's config can state which linears have a bias."""
    biases = linear_biases(model_config)
    others = {biases[name] for name in LINEAR_ROLES if name != "linear_qkv"}
    return len(others) == 1 and biases["linear_qkv"] >= max(others)

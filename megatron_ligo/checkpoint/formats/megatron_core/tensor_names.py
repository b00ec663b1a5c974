"""File and tensor names of Megatron-core's distributed checkpoints."""

from __future__ import annotations

from megatron_ligo.arch.mcore_names import to_fused_name

CONFIG_FILE, COMMON_FILE = "metadata.json", "common.pt"
# From Megatron-core 0.19 on, this object, a list of one, replaces the common file.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Optimizer states that hold fp32 master weights: of a distributed optimizer, and of any other.
MASTER_STATES = ("param", "fp32_param")


EMBEDDING = "embedding.word_embeddings.weight"


def list_places(name: str, indices: tuple[int, ...]) -> list[tuple[str, int]]:
    """Returns the names under which a tensor may be stored, each with the first of its indices that it is stacked by.

    First the tensor of all layers (and all their experts). name: of the local layer spec; indices: the layer's number,
    and for an expert's tensor the expert's.
    """
    if not indices:
        return [(name, 0)]
    layer, *experts = indices
    if not experts:
        return [(_without_layer(name, layer), 0), (name, 1)]
    (expert,) = experts
    stacked = name.replace(f".local_experts.{expert}.", ".experts.", 1)
    alone = name.replace(f".local_experts.{expert}.", f".experts.{expert}.", 1)
    return [(_without_layer(stacked, layer), 0), (stacked, 1), (alone, 2)]


def _without_layer(name: str, layer: int) -> str:
    return name.replace(f".layers.{layer}.", ".layers.", 1)


def layer_spec_names(name: str) -> tuple[str, ...]:
    """Returns the names of a tensor under Transformer Engine's layer spec, and under the local one if it differs.

    Before experts, which no linear of a layer precedes, Transformer Engine's norm has the local spec's name.
    """
    return tuple(dict.fromkeys((to_fused_name(name), name)))


def optimizer_state_name(name: str, state: str) -> str:
    """Returns the name of the tensor of a parameter's optimizer state, such as exp_avg."""
    return f"optimizer.state.{state}.{name}"

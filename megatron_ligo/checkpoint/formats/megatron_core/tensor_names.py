"""Names in Megatron-core's checkpoints beside those in the table, which are those of its local layers."""

from __future__ import annotations

from megatron_ligo.arch.mcore_names import EXTRA_STATE
from megatron_ligo.arch.mcore_names import sort_by_construction as as_made
from megatron_ligo.arch.mcore_names import to_fused_name as fused_name
from megatron_ligo.arch.mcore_names import to_local_name as local_name

__all__ = ["EXTRA_STATE", "as_made", "fused_name", "local_name"]

# A distributed checkpoint's files beside those of torch.distributed.checkpoint, and the kind that it is.
CONFIG, COMMON = "metadata.json", "common.pt"
# Where there is no such file (from Megatron-core 0.19 on), an object of the checkpoint holds the same, in a list.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Under these a distributed optimizer and any other one keep the weights in fp32.
MASTERS = ("param", "fp32_param")


def stacked_name(name: str, layer: int) -> str:
    """The name of the tensor in which all layers' tensors are stacked."""
    return name.replace(f".layers.{layer}.", ".layers.", 1)


def state_name(name: str, kind: str) -> str:
    """The name of the optimizer's tensor of a kind for a weight."""
    return f"optimizer.state.{kind}.{name}"

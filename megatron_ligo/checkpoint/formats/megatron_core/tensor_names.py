"""File and tensor names of Megatron-core's distributed checkpoints."""

from __future__ import annotations

CONFIG_FILE, COMMON_FILE = "metadata.json", "common.pt"
# From Megatron-core 0.19 on, this object, a list of one, replaces the common file.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# Optimizer states that hold fp32 master weights: of a distributed optimizer, and of any other.
MASTER_STATES = ("param", "fp32_param")


def stacked_name(name: str, layer: int) -> str:
    """Returns the name of the tensor in which all layers' tensors are stacked."""
    return name.replace(f".layers.{layer}.", ".layers.", 1)


def optimizer_state_name(name: str, state: str) -> str:
    """Returns the name of the tensor of a parameter's optimizer state, such as exp_avg."""
    return f"optimizer.state.{state}.{name}"

"""Names in Megatron-core's checkpoints beside those in the table, which are those of its local layers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

# Transformer Engine keeps a layer's norms inside the linears that follow them; so do all distributed checkpoints.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# A distributed checkpoint's files beside those of torch.distributed.checkpoint, and the kind that it is.
CONFIG, COMMON = "metadata.json", "common.pt"
# Where there is no such file (from Megatron-core 0.19 on), an object of the checkpoint holds the same, in a list.
COMMON_OBJECT = "common_state/shard_0_1"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
# No weights: what a module keeps for fp8, and nothing without.
EXTRA_STATE = "_extra_state"
# Under these a distributed optimizer and any other one keep the weights in fp32.
MASTERS = ("param", "fp32_param")

LAYER = re.compile(r"\.layers\.(\d+)\.")
# The modules of a local layer in the order in which it makes them: its parameters are numbered so.
MADE = ("input_layernorm.", "self_attention.linear_proj.", "self_attention.linear_qkv.", "pre_mlp_layernorm.", "mlp.")


def local_name(name: str) -> str:
    """A parameter's name as mcore's local layers have it, whatever the layer spec."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name


def fused_name(name: str) -> str:
    """The inverse of `local_name`."""
    for fused, plain in FUSED_NORMS.items():
        name = name.replace(plain, fused)
    return name


def stacked_name(name: str, layer: int) -> str:
    """The name of the tensor in which all layers' tensors are stacked."""
    return name.replace(f".layers.{layer}.", ".layers.", 1)


def state_name(name: str, kind: str) -> str:
    """The name of the optimizer's tensor of a kind for a weight."""
    return f"optimizer.state.{kind}.{name}"


def as_made(names: Iterable[str]) -> list[str]:
    """A model's names, layer after layer, those of a layer in the order in which Megatron-core makes its parameters."""
    layers = groupby(names, lambda name: next(iter(LAYER.findall(name)), None))
    return [name for _, layer in layers for name in sorted(layer, key=_turn)]


def _turn(name: str) -> int:
    return next((turn for turn, module in enumerate(MADE) if module in name), len(MADE))

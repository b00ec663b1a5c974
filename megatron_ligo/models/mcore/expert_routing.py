"""Megatron-core's settings of a layer's router and experts."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed import device

# Megatron-core 0.16 reads this name, which it defines only where Transformer Engine is installed.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def to_routing_settings(model_config: ModelConfig, aux_loss: float) -> dict[str, object]:
    """Returns mcore's settings of the router and the experts; none without experts.

    The router's softmax, in fp32, is over the chosen experts only if their weights add up to 1, else over all. The aux
    loss is that of each sequence, so that it does not depend on how a batch is divided.
    """
    if not model_config.num_experts:
        return {}
    return {
        "num_moe_experts": model_config.num_experts,
        "moe_ffn_hidden_size": model_config.ffn_size,
        "moe_shared_expert_intermediate_size": model_config.shared_expert_ffn_size or None,
        "moe_shared_expert_gate": model_config.shared_expert_ffn_size > 0,
        "moe_router_topk": model_config.top_k,
        "moe_router_pre_softmax": not model_config.renormalises_routing,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss" if aux_loss else "none",
        "moe_aux_loss_coeff": aux_loss,
        "moe_token_dispatcher_type": device.token_dispatcher(),
    }


def build_dispatcher(config: TransformerConfig, local_experts: range) -> MoETokenDispatcher:
    """Builds the dispatcher of a layer's tokens to this rank's experts."""
    kind = {"allgather": MoEAllGatherTokenDispatcher, "alltoall": MoEAlltoAllTokenDispatcher}
    groups = moe_utils.get_default_pg_collection()
    return kind[config.moe_token_dispatcher_type](len(local_experts), list(local_experts), config, groups)


def scale_router_loss(num_micro_batches: int, device: torch.device | str) -> None:
    """Divides the aux loss of each micro-batch by their number, as DeepSpeed divides the loss."""
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / num_micro_batches, device=device))

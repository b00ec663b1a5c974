"""Expert parallelism of a model: which experts a rank has, and what becomes of its gradients.

Expert-parallel ranks read different samples, and each computes its experts for the tokens of all of them. An expert's
gradient on its rank is then already the sum over these ranks, and all else, which they replicate, has one gradient a
rank. Both become means here, so that the engine's mean over the ranks with the same experts is the mean over all
samples.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.parameters import iterate_parameters
from megatron_ligo.models.mcore.layer_calls import sum_gradients


def first_local_expert(model_config: ModelConfig, mesh: Mesh) -> int:
    """Returns the number in its layer of the first expert that this rank has."""
    return mesh.ep_rank * (model_config.num_experts // mesh.ep)


def average_gradients(model: nn.Module, model_config: ModelConfig, mesh: Mesh) -> None:
    """Registers hooks that make each gradient the mean over the expert-parallel ranks' samples."""
    if mesh.ep == 1:
        return
    replicated = []
    for parameter, item in iterate_parameters(model, model_config):
        if item.params[0].in_expert:
            parameter.register_hook(partial(_divide, mesh.ep))
        else:
            replicated.append(parameter)
    sum_gradients(replicated, mesh.ep_group, 1 / mesh.ep)


def _divide(ranks: int, grad: Tensor) -> Tensor:
    """Returns a gradient, of any shape, divided by the number of ranks."""
    return grad / ranks

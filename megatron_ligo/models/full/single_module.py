"""The base of the models to pretrain as one module (PP = 1), and the final construction step of every model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from megatron_ligo.arch.mcore_names import to_local_name
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import TpUse
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full import expert_parallel, parameters
from megatron_ligo.models.full.universal_saving import prepare_saving
from megatron_ligo.models.loss import LossMixin
from megatron_ligo.models.mcore.layer_calls import sum_gradients


def finish_model(model: nn.Module, model_config: ModelConfig, mesh: Mesh) -> None:
    """Ends a model's construction: marks sharded parameters, sums gradients of partial uses, prepares checkpoints."""
    model.first_expert = expert_parallel.first_local_expert(model_config, mesh)
    parameters.mark_tensor_parallel(model, model_config, mesh)
    sum_gradients(partially_used(model, model_config), mesh.tp_group)
    expert_parallel.average_gradients(model, model_config, mesh)
    prepare_saving(model, model_config, mesh)


def partially_used(model: nn.Module, model_config: ModelConfig) -> list[nn.Parameter]:
    """Returns the replicated parameters that each TP rank uses partially: for its own tokens (marked by mcore as
    `sequence_parallel`), or as their `tp_use` states."""
    return [
        parameter
        for parameter, item in parameters.iterate_parameters(model, model_config)
        if getattr(parameter, "sequence_parallel", False)
        or (item.tp_dim is None and any(param.tp_use is TpUse.PARTIAL for param in item.params))
    ]


class SingleModule(LossMixin, nn.Module, ABC):
    """forward(inputs, labels, loss_mask) -> mean loss. The weights must be filled or loaded first.

    inputs: those of `logits`; labels (int64), loss_mask: (b, s). Parameters have the family's mcore names.
    """

    recompute: bool
    first_expert = 0

    def finish_construction(self, model_config: ModelConfig, mesh: Mesh, recompute: bool) -> None:
        assert mesh.pp == 1, "FullPipeline is for PP > 1"
        self.model_config = model_config
        self.mesh = mesh
        self.recompute = recompute
        finish_model(self, model_config, mesh)

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """inputs, tokens (b, s) or images -> this rank's columns of the logits (s, b, padded vocabulary / tp)."""

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield to_local_name(name, self.first_expert), parameter

    def forward(self, inputs: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        return self.measure(self.logits(inputs), labels, loss_mask)

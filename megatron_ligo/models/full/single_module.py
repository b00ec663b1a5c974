"""What the models to pretrain have in common, and what those have that are one module (PP = 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from megatron_ligo.arch.mcore_names import to_local_name
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.universal_saving import prepare_saving
from megatron_ligo.models.loss import LossMixin
from megatron_ligo.models.mcore.layer_calls import reduce_norm_gradients


def finish_model(model: nn.Module, model_config: ModelConfig, mesh: Mesh) -> None:
    """The last step of a constructor: how each parameter is cut, whose gradients are summed, what checkpoints hold."""
    parameters.mark_tensor_parallel(model, model_config, mesh.tp)
    reduce_norm_gradients(model.parameters(), mesh.tp_group)
    prepare_saving(model, model_config, mesh)


class SingleModule(LossMixin, nn.Module, ABC):
    """forward(seen, labels, loss_mask) -> mean loss. Weights are to be filled or loaded.

    seen: what `logits` takes; labels (int64), loss_mask: (b, s). Its parameters bear the names of the table's mcore
    slots.
    """

    recompute: bool

    def finish_construction(self, model_config: ModelConfig, mesh: Mesh, recompute: bool) -> None:
        assert mesh.pp == 1, "stages.py is for pipelines"
        self.model_config = model_config
        self.mesh = mesh
        self.recompute = recompute
        finish_model(self, model_config, mesh)

    @abstractmethod
    def logits(self, seen: Tensor) -> Tensor:
        """This rank's columns of the padded vocabulary, (s, b, padded / tp)."""

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield to_local_name(name), parameter

    def forward(self, seen: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        return self.measure(self.logits(seen), labels, loss_mask)

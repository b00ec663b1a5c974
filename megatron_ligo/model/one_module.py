"""What the models to pretrain have in common, and what those have that are one module (PP = 1)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from megatron_ligo.arch.dims import Dims
from megatron_ligo.formats.mcore_names import local_name
from megatron_ligo.model import weights
from megatron_ligo.model.layers import reduce_norm_gradients
from megatron_ligo.model.loss import Measured
from megatron_ligo.model.saved import prepare_saving
from megatron_ligo.parallel.mesh import Mesh


def complete(model: nn.Module, dims: Dims, mesh: Mesh) -> None:
    """The last step of a constructor: how each parameter is cut, whose gradients are summed, what checkpoints hold."""
    weights.mark_split(model, dims, mesh.tp)
    reduce_norm_gradients(model.parameters(), mesh.tp_group)
    prepare_saving(model, dims, mesh)


class OneModule(Measured, nn.Module, ABC):
    """forward(seen, labels, loss_mask) -> mean loss. Weights are to be filled or loaded.

    seen: what `logits` takes; labels (int64), loss_mask: (b, s). Its parameters bear the names of the table's mcore
    slots.
    """

    recompute: bool

    def complete(self, dims: Dims, mesh: Mesh, recompute: bool) -> None:
        assert mesh.pp == 1, "stages.py is for pipelines"
        self.dims = dims
        self.mesh = mesh
        self.recompute = recompute
        complete(self, dims, mesh)

    @abstractmethod
    def logits(self, seen: Tensor) -> Tensor:
        """This rank's columns of the padded vocabulary, (s, b, padded / tp)."""

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield local_name(name), parameter

    def forward(self, seen: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
        return self.measure(self.logits(seen), labels, loss_mask)

"""A dense checkpoint as a mixture with a single expert, from which experts are grown."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Role, layer_index
from megatron_ligo.checkpoint.formats.hf.config_json import select_carried
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.growth.experts import SHARED, as_mixture

EXPERT_BLOCK = {Role.EXPERT_GATE: Role.FFN_GATE, Role.EXPERT_UP: Role.FFN_UP, Role.EXPERT_DOWN: Role.FFN_DOWN}
SHARED_BLOCK = {
    Role.SHARED_EXPERT_GATE: Role.FFN_GATE,
    Role.SHARED_EXPERT_UP: Role.FFN_UP,
    Role.SHARED_EXPERT_DOWN: Role.FFN_DOWN,
}
# The shared expert's output is multiplied by a sigmoid, which is a half for all tokens at first. Of a gradient's
# moments, the dual: the weight's factor once, or its square, below.
SHARED_DOWN_FACTORS = {WEIGHT: 2.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}


class MixtureReader(Reader):
    """The dense model's tensors under the keys of its form with experts. What it lacks, the router among it, is zero.

    start: operator.expert_start, by which the expert or the shared expert holds the dense block.
    """

    format = "mixture"
    path = None

    def __init__(self, dense: Reader, start: str | None = None):
        self.dense = dense
        self.path = dense.path
        self.model_config = as_mixture(dense.model_config, start)
        self.step, self.layout, self.files, self.unread = dense.step, dense.layout, dense.files, dense.unread
        self.carried = select_carried(dense.carried, self.model_config.model_type)
        self.accepted, self.groups = dense.accepted, dense.groups
        self._block, self._absent = (SHARED_BLOCK, EXPERT_BLOCK) if start == SHARED else (EXPERT_BLOCK, SHARED_BLOCK)

    @property
    def has_moments(self) -> bool:
        return self.dense.has_moments

    def info(self, key: str) -> TensorInfo:
        param = self.param(key)
        is_zero = self._is_zero(param)
        return TensorInfo(
            param.shape(self.model_config),
            torch.float32 if is_zero else self.dense.info(self._dense_key(key, param)).dtype,
        )

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        param = self.param(key)
        if self._is_zero(param):
            return torch.zeros(param.shape(self.model_config))
        tensor = self.dense.read(self._dense_key(key, param), kind)
        return tensor * SHARED_DOWN_FACTORS[kind] if param.role is Role.SHARED_EXPERT_DOWN else tensor

    def close(self) -> None:
        self.dense.close()

    def _is_zero(self, param: ParamSpec) -> bool:
        return param.role in (Role.ROUTER, Role.SHARED_EXPERT_WEIGHT, *self._absent)

    def _dense_key(self, key: str, param: ParamSpec) -> str:
        """Returns the dense model's key: `layers.3.experts.0.up` -> `layers.3.up`."""
        if param.role not in self._block:
            return key
        return self.dense.arch.get(self._block[param.role]).key.format(layer_index(key))


def as_mixture_reader(source: Reader, start: str | None = None) -> Reader:
    """Returns the source itself if it has experts, and otherwise as a mixture with one."""
    return source if source.model_config.num_experts else MixtureReader(source, start)

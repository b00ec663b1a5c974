"""A dense checkpoint as a mixture with a single expert, from which experts are grown."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Role, layer_index
from megatron_ligo.checkpoint.formats.hf.config_json import select_carried
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.growth.experts import as_mixture

DENSE_ROLES = {Role.EXPERT_GATE: Role.FFN_GATE, Role.EXPERT_UP: Role.FFN_UP, Role.EXPERT_DOWN: Role.FFN_DOWN}


class MixtureReader(Reader):
    """The dense model's tensors under the keys of its form with experts. Its router's weight is zero, (1, hidden).

    CheckpointError for Adam's moments: they are not grown into experts.
    """

    format = "mixture"
    path = None

    def __init__(self, dense: Reader):
        self.dense = dense
        self.path = dense.path
        self.model_config = as_mixture(dense.model_config)
        self.step, self.layout, self.files, self.unread = dense.step, dense.layout, dense.files, dense.unread
        self.carried = select_carried(dense.carried, self.model_config.model_type)
        self.accepted = dense.accepted

    def info(self, key: str) -> TensorInfo:
        param = self.param(key)
        if param.role is Role.ROUTER:
            return TensorInfo(param.shape(self.model_config), torch.float32)
        return TensorInfo(param.shape(self.model_config), self.dense.info(self._dense_key(key, param)).dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        param = self.param(key)
        if kind != WEIGHT:
            hint = "Set handoff.moments = 'reset'."
            raise CheckpointError(Problem(f"{self.path}: {kind}", "none: no rule grows them into experts", kind, hint))
        if param.role is Role.ROUTER:
            return torch.zeros(param.shape(self.model_config))
        return self.dense.read(self._dense_key(key, param), kind)

    def close(self) -> None:
        self.dense.close()

    def _dense_key(self, key: str, param: ParamSpec) -> str:
        """Returns the dense model's key: `layers.3.experts.0.up` -> `layers.3.up`."""
        if param.role not in DENSE_ROLES:
            return key
        return self.dense.arch.get(DENSE_ROLES[param.role]).key.format(layer_index(key))


def as_mixture_reader(source: Reader) -> Reader:
    """Returns the source itself if it has experts, and otherwise as a mixture with one."""
    return source if source.model_config.num_experts else MixtureReader(source)

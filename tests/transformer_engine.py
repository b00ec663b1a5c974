"""Transformer Engine's modules, emulated on the CPU: fused norms, their names, an extra state in each module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import megatron.core.extensions.transformer_engine as extensions
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_ligo.distributed import device
from megatron_ligo.models.mcore import layer_spec
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.norm import Norm, normalise


class ExtraState:
    """Saves what Transformer Engine's modules save without fp8: a tensor of no bytes."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class LayerNormColumnLinear(ExtraState, ColumnParallelLinear):
    """A column-parallel linear with the norm before it; the norm's parameters are registered first."""

    def __init__(self, input_size: int, output_size: int, *, config, init_method, bias: bool, tp_group=None, **options):
        super().__init__(
            input_size,
            output_size,
            config=config,
            init_method=init_method,
            gather_output=False,
            bias=bias,
            skip_bias_add=options["skip_bias_add"],
            tp_group=tp_group,
        )
        self.norm_kind = config.layernorm_epsilon, config.normalization
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.layer_norm_weight = nn.Parameter(torch.full((input_size,), 1 - self.offset, dtype=config.params_dtype))
        self.layer_norm_bias = None
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(input_size, dtype=config.params_dtype))
        norms = {name: parameter for name, parameter in self._parameters.items() if name.startswith("layer_norm_")}
        self._parameters = norms | self._parameters
        for parameter in norms.values():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor, *arguments, **options) -> tuple[Tensor, Tensor | None]:
        x = normalise(x, self.layer_norm_weight + self.offset, self.layer_norm_bias, *self.norm_kind)
        return super().forward(x, *arguments, **options)


class RowLinear(ExtraState, RowParallelLinear):
    pass


class FusedNorm(ExtraState, Norm):
    pass


class Attention(ExtraState, FusedAttention):
    pass


def fused_layer_spec() -> ModuleSpec:
    spec = copy.deepcopy(layer_spec.get_gpt_layer_local_spec())
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
    attention, mlp = spec.submodules.self_attention.submodules, layer_spec.get_mlp_submodules(spec)
    attention.core_attention = Attention
    attention.linear_qkv = mlp.linear_fc1 = LayerNormColumnLinear
    attention.linear_proj = mlp.linear_fc2 = RowLinear
    return spec


@contextlib.contextmanager
def emulated_transformer_engine(installed: bool = True) -> Iterator[None]:
    """Within it, models are built as on a machine with Transformer Engine (or without)."""
    with (
        mock.patch.object(device, "has_transformer_engine", lambda: installed),
        mock.patch.object(layer_spec, "get_gpt_layer_with_transformer_engine_spec", fused_layer_spec),
        mock.patch.object(extensions, "TENorm", FusedNorm),
    ):
        yield

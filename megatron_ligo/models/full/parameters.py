"""The parameters of a Megatron-core model: their contents, one rank's shards, and initial values.

Names are those of Megatron-core's local layer spec, in every layout and with every layer spec, so one checkpoint fits
them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role, Use
from megatron_ligo.common.errors import ConfigError, ErrorCollector, did_you_mean
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.growth.codes.codes_file import read_codes
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor

if TYPE_CHECKING:
    from megatron_ligo.distributed.mesh import Mesh

TensorReader = Callable[[str], Tensor]  # canonical key -> canonical tensor

INIT_STD = 0.02
HEAD_ROLES = (Role.HEAD_TRANSFORM, Role.HEAD_NORM, Role.HEAD, Role.PATCH_HEAD)


def read_local_tensor(item: StoredTensor, read: TensorReader, model_config: ModelConfig, tp: int, rank: int) -> Tensor:
    """Reads a TP rank's shard of a stored tensor, in its local shape. May be a view of what `read` returned."""
    return item.assemble_shard([read(key) for key in item.keys], model_config, tp, rank)


def fill_parameters(model: nn.Module, model_config: ModelConfig, mesh: Mesh, read: TensorReader) -> None:
    """Sets every parameter of this rank's model, before engine creation, from canonical tensors cast to its dtype."""
    for parameter, item in iterate_parameters(model, model_config):
        set_parameter(parameter, read_local_tensor(item, read, model_config, mesh.tp, mesh.tp_rank))


@torch.no_grad()
def set_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets a parameter to a value of its shape; of one that ZeRO 3 has divided, this rank's part."""
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        return
    own = parameter.ds_tensor
    first = dist.get_rank(parameter.ds_process_group) * own.numel()
    part = value.reshape(-1)[first : first + own.numel()]
    # The last part is padded.
    own.zero_()[: part.numel()].copy_(part)


def iterate_parameters(model: nn.Module, model_config: ModelConfig) -> Iterator[tuple[nn.Parameter, StoredTensor]]:
    """Yields each parameter with the stored tensor that it holds. ConfigError if a name is not Megatron-core's."""
    stored = fused_tensors.stored_tensors(architectures.get(model_config.arch), model_config, "mcore")
    errors = ErrorCollector(f"the model has parameters that {model_config.arch} lacks", ConfigError)
    for name, parameter in model.named_parameters():
        if name in stored:
            yield parameter, stored[name]
        else:
            errors.add(name, "a name of Megatron-core's (local) layers", "none", did_you_mean(name, stored))
    errors.raise_if_any()


def mark_tensor_parallel(model: nn.Module, model_config: ModelConfig, mesh: Mesh) -> None:
    """Marks the parameters that TP shards, and on which ranks gradient norms count them.

    DeepSpeed counts what is marked `tensor_model_parallel` on every rank, and all else on the first model-parallel one.
    Replicas of expert-parallel ranks count once, experts on every rank that has them.
    """
    for parameter, item in iterate_parameters(model, model_config):
        cut = mesh.tp > 1 and item.tp_dim is not None
        in_expert = mesh.ep > 1 and item.params[0].in_expert
        parameter.tensor_model_parallel = in_expert or (cut and mesh.ep_rank == 0)
        parameter.partition_dim = item.tp_dim if cut else -1
        parameter.partition_stride = 1
        # Megatron-core marks divided experts, by what DeepSpeed knows its own expert layers.
        parameter.allreduce = True


def build_initial_weights(model_config: ModelConfig, seed: int, codes: str = "") -> TensorReader:
    """Returns a reader of random fp32 weights with Megatron's distribution. Each tensor has its own seed, so they do
    not depend on the layout.

    Gains are 1, biases 0, matrices normal with std 0.02, or 0.02 / sqrt(2 layers) if they write the residual stream.
    codes: a folder of token codes, which become the word embedding, of root mean square 1 / sqrt(hidden size).
    """
    arch = architectures.get(model_config.arch)

    def read(key: str) -> Tensor:
        param = arch.param(key)
        shape = param.shape(model_config)
        if param.axes[0].use is Use.GAIN:
            return torch.full(shape, 1 - arch.gain_offset)
        if len(shape) == 1:
            return torch.zeros(shape)
        if codes and param.role is Role.WORD_EMBEDDING:
            return read_codes(Path(codes), *shape) * model_config.hidden_size**-0.5
        std = INIT_STD / (2 * model_config.num_layers) ** 0.5 if param.writes_residual else INIT_STD
        return torch.empty(shape).normal_(0.0, std, generator=seeded_generator(seed, key))

    return read


def find_head_parameters(model: nn.Module, model_config: ModelConfig) -> set[nn.Parameter]:
    """Returns the parameters of the output head, except a weight tied to the embedding."""
    return {
        parameter for parameter, item in iterate_parameters(model, model_config) if item.params[0].role in HEAD_ROLES
    }

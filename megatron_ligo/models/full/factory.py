"""The model to pretrain, whatever its family and the number of stages."""

from __future__ import annotations

from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import Dims
from megatron_ligo.arch.spec import Task
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.encoder import PretrainedEncoder
from megatron_ligo.models.full.gpt import Pretrained
from megatron_ligo.models.full.image_classifier import Classifier
from megatron_ligo.models.full.pipeline_model import PretrainedPipeline
from megatron_ligo.models.mcore.layer_spec import Build

MODULES = {Task.NEXT_TOKEN: Pretrained, Task.MASKED_TOKENS: PretrainedEncoder, Task.LABEL: Classifier}


def pretrained(dims: Dims, build: Build, mesh: Mesh, recompute: bool = False) -> nn.Module:
    """Megatron-core's modules with weights that are to be filled or loaded."""
    if mesh.pp > 1:
        return PretrainedPipeline(dims, build, mesh, recompute)
    return MODULES[architectures.get(dims.arch).task](dims, build, mesh, recompute)

"""Construction of the model to pretrain, for any family and any number of pipeline stages."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import deepspeed
from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Task
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.encoder import FullEncoder
from megatron_ligo.models.full.gpt import FullGPT
from megatron_ligo.models.full.image_classifier import FullImageClassifier
from megatron_ligo.models.full.pipeline_model import FullPipeline
from megatron_ligo.models.mcore.layer_spec import BuildOptions

MODULES = {Task.NEXT_TOKEN: FullGPT, Task.MASKED_TOKENS: FullEncoder, Task.LABEL: FullImageClassifier}


def build_model(
    model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False, divided: bool = False
) -> nn.Module:
    """Builds a model from Megatron-core's modules. Its weights are uninitialised: fill or load them afterwards.

    divided: for ZeRO 3, each module is divided over its replicas once it is built, and no rank holds the whole model.
    """
    if mesh.pp > 1:
        return FullPipeline(model_config, build, mesh, recompute)
    with _dividing(build, mesh) if divided else nullcontext():
        return MODULES[architectures.get(model_config.arch).task](model_config, build, mesh, recompute)


def _dividing(build: BuildOptions, mesh: Mesh) -> AbstractContextManager:
    return deepspeed.zero.Init(
        data_parallel_group=mesh.expert_dp_group,
        mem_efficient_linear=False,
        dtype=build.dtype,
        # The modules state their tensors' dtype and device.
        tensor_overrides=[],
    )

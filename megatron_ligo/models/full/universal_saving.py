"""Checkpoint metadata for DeepSpeed's own converter (`ds_to_universal`)."""

from __future__ import annotations

import re
from collections.abc import Callable

from deepspeed.checkpoint import constants
from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Pack
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.expert_parallel import first_local_expert
from megatron_ligo.models.full.state_dict_names import use_table_names
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor


def prepare_saving(model: nn.Module, model_config: ModelConfig, mesh: Mesh) -> None:
    """Adds the parameters' sharding to a model's checkpoints, which hold the tables' names and only weights.

    DeepSpeed's converter takes all model-parallel ranks for tensor-parallel ones, so it gets none of divided experts:
    it then names what it lacks. Our own conversion reads them.
    """
    if mesh.ep == 1:
        setattr(model, constants.UNIVERSAL_CHECKPOINT_INFO, build_universal_info(model_config, mesh.pp))
    use_table_names(model, first_local_expert(model_config, mesh))


def build_universal_info(model_config: ModelConfig, pp: int) -> dict:
    """Describes each parameter's sharding, by name patterns, in the format of DeepSpeed's converter."""
    stored = fused_tensors.stored_tensors(architectures.get(model_config.arch), model_config, "mcore")
    patterns = {name: re.sub(r"layers\\\.\d+", r"layers\.\\d+", re.escape(name)) + "$" for name in stored}

    def matching(choose: Callable[[StoredTensor], bool]) -> list[str]:
        return list(dict.fromkeys(patterns[name] for name, item in stored.items() if choose(item)))

    pipelined = [patterns["embedding.word_embeddings.weight"]] if pp > 1 and model_config.tied else []
    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.ORIGINAL_VOCAB_SIZE: model_config.vocab_size,
        constants.VOCABULARY_PARAMETER_PATTERNS: matching(lambda item: item.is_vocab_parallel),
        constants.TP_REPLICATED_PARAMETER_PATTERNS: matching(lambda item: item.tp_dim is None),
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: matching(lambda item: item.tp_dim == 1),
        constants.PARAMETER_WITH_2_SUB_PARAMS_CAT_DIM_0: matching(lambda item: item.pack is Pack.STACKED),
        constants.PIPELINE_REPLICATED_PARAMETER_PATTERNS: pipelined,
    }

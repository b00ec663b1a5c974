"""Models of transformers in memory: read as any checkpoint is, and built from any Reader.

A model's config and state dict are taken in the form in which `save_pretrained` writes them, so that the same tables of
keys and names decide as for a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.hf.format import NAME, HfNamesReader
from megatron_ligo.checkpoint.formats.hf.shards import open_state_dict
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding.fused_tensors import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def config_content(config: PreTrainedConfig, class_name: str | None = None) -> dict:
    """Returns what a config's `save_pretrained` writes into config.json. class_name: the model's class, if known."""
    content = json.loads(config.to_json_string(use_diff=True))
    return content if class_name is None else {**content, "architectures": [class_name]}


def read_state_dict(
    state: Mapping[str, object],
    config: Mapping[str, object],
    where: str = "a state dict in memory",
    accepted: AcceptedKeys = NO_KEYS,
) -> HfNamesReader:
    """Opens a state dict of a checkpoint's names, with the content of its config.json.

    The Reader shares the tensors' memory. Raises CheckpointError as for a folder.
    """
    return HfNamesReader(config, open_state_dict(state, where), where, accepted)


def read_model(model: PreTrainedModel, accepted: AcceptedKeys = NO_KEYS) -> HfNamesReader:
    """Opens a model of transformers, whose tensors the Reader shares. Raises CheckpointError as for a folder."""
    import transformers

    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel):
        hint = (
            "Pass the model inside of a wrapper (model.module; model._orig_mod after torch.compile), or "
            "ligo.open_state_dict(state, config)."
        )
        raise CheckpointError(Problem("model", "a model of transformers", name, hint))
    # transformers uses other names in memory than in files.
    state = transformers.core_model_loading.revert_weight_conversion(model, model.state_dict())
    return read_state_dict(state, config_content(model.config, name), f"{name} in memory", accepted)


def build_model(reader: Reader, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    """Builds transformers' model of a checkpoint, whole in memory, with weights of `dtype`, in evaluation mode.

    options: more arguments of `from_pretrained`, such as attn_implementation.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = config_json.to_hf_config(reader.model_config, reader.carried, dtype)
    hf_config = CONFIG_MAPPING[reader.model_config.model_type](**config)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    load = getattr(transformers, config["architectures"][0]).from_pretrained
    state = dict(_hf_state_dict(reader, dtype))
    model, report = load(None, config=hf_config, state_dict=state, dtype=dtype, output_loading_info=True, **options)
    if bars:
        transformers.utils.logging.enable_progress_bar()
    unexpected, missing = set(report["unexpected_keys"]), set(report["missing_keys"])
    # A class may lack an optional part of the checkpoint, or have one more: neither changes its first output.
    params = [param for param in reader.arch.params if (param.requires or param.tied_to) and not param.in_layer]
    optional = {param.locations[NAME].name for param in params}
    optional |= {reader.arch.stored_name(param.key, reader.model_config, NAME) for param in params}
    assert unexpected | missing <= optional, f"{type(model).__name__}: unexpected {unexpected}, missing {missing}"
    return model.eval()


def _hf_state_dict(reader: Reader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, item in stored_tensors(reader.arch, reader.model_config, NAME).items():
        yield name, item.assemble([reader.read(key).to(dtype) for key in item.keys], reader.model_config)

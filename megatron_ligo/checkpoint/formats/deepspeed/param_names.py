"""The names that a DeepSpeed engine's parameters have: Megatron-core's, or transformers' if it trained such a model."""

from __future__ import annotations

from collections.abc import Collection

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import tensor_names
from megatron_ligo.checkpoint.formats.hf.common_prefix import Renaming, find_renaming
from megatron_ligo.sharding import fused_tensors

NAMING_FORMATS = ("mcore", tensor_names.FORMAT)


def match_naming(arch: Architecture, model_config: ModelConfig, names: Collection[str]) -> tuple[str, Renaming]:
    """Returns the format whose names match the most of these, and how these become its names."""
    namings = [naming for naming in NAMING_FORMATS if all(naming in param.locations for param in arch.params)]
    assert namings, f"{arch.name} has no names in {' or '.join(NAMING_FORMATS)}"
    matches = [_match(arch, model_config, names, naming) for naming in namings]
    counts = [count for count, _ in matches]
    best = counts.index(max(counts))
    return namings[best], matches[best][1]


def _match(arch: Architecture, model_config: ModelConfig, names: Collection[str], naming: str) -> tuple[int, Renaming]:
    """Returns how many of the model's tensors are there under a naming, and what is changed in the names for that."""
    if naming == tensor_names.FORMAT:
        renaming = tensor_names.find_common_prefix(arch, model_config, names)
        renamed = {renaming.apply(name) for name in names}
        config = tensor_names.detect_optional_parts(arch, model_config, renamed)
        located = tensor_names.locate_tensors(arch, config, renamed).values()
        return sum(stored.name in renamed for stored in located), renaming
    expected = fused_tensors.stored_tensors(arch, model_config, naming).keys()
    renaming = find_renaming(names, "", lambda renamed: len(expected & set(renamed)))
    return len(expected & {renaming.apply(name) for name in names}), renaming

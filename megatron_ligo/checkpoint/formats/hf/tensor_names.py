"""Finds an architecture's tensors in Hugging Face files: with or without the base model's prefix, or by older names.

The tensors, not the class named in the config, decide which optional parts a model has: files often hold more parts
than that class, or fewer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import layer_index
from megatron_ligo.sharding import fused_tensors

FORMAT = "hf"


@dataclass(frozen=True)
class StoredName:
    """The name of a tensor in a file (the current one if it is missing), and the names of its duplicates."""

    name: str
    duplicates: tuple[str, ...] = ()


def detect_optional_parts(arch: Architecture, model_config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Returns the config with its optional parts set by the file's tensors. Parts without tensors stay unchanged."""
    for part in arch.optional_parts(model_config.model_type):
        with_part = replace(model_config, **{part: True})
        params = [param for param in arch.params if param.requires == part and param.is_stored(with_part)]
        if params:
            is_present = any(name in names for param in params for name in _possible_names(arch, with_part, param.key))
            model_config = replace(model_config, **{part: is_present})
    return model_config


def locate_tensors(arch: Architecture, model_config: ModelConfig, names: Collection[str]) -> dict[str, StoredName]:
    """Finds each stored tensor of a model in a file with tensors of these `names`."""
    located = {}
    for item in fused_tensors.stored_tensors(arch, model_config, FORMAT).values():
        own_names = [name for name in _possible_names(arch, model_config, item.keys[0]) if name in names]
        tied_names = [
            name for name in _tied_names(arch, model_config, item.keys[0]) if name in names and name not in own_names
        ]
        first = own_names[0] if own_names else item.name
        located[item.name] = StoredName(first, (*own_names[1:], *tied_names))
    return located


def _possible_names(arch: Architecture, model_config: ModelConfig, key: str) -> list[str]:
    """Returns every name that a file may use for a key, the current one first."""
    names = [arch.stored_name(key, model_config, FORMAT), _fill_layer(arch.param(key).locations[FORMAT].name, key)]
    base = arch.base_prefixes.get(FORMAT, "")
    names += [name.removeprefix(base) for name in names] + [base + name for name in names]
    names += [
        name.removesuffix(new) + old
        for old, new in arch.renamed_suffixes.get(FORMAT, {}).items()
        for name in names
        if name.endswith(new)
    ]
    return list(dict.fromkeys(names))


def _tied_names(arch: Architecture, model_config: ModelConfig, key: str) -> Iterator[str]:
    for param in arch.params:
        if model_config.tied and param.exists(model_config) and param.tied_to == key:
            yield param.locations[FORMAT].name


def _fill_layer(name: str, key: str) -> str:
    layer = layer_index(key)
    return name if layer is None else name.format(layer)

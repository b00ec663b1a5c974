"""Finds an architecture's tensors in Hugging Face files: with or without the base model's prefix, or by older names.

The tensors, not the class named in the config, decide which optional parts a model has: files often hold more parts
than that class, or fewer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import key_indices
from megatron_ligo.checkpoint.formats.hf.common_prefix import Renaming, common_parts, find_renaming
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
    """Finds each stored tensor of a model in a file with tensors of these `names`.

    Of several tied tensors a file may hold any.
    """
    located = {}
    for item in fused_tensors.stored_tensors(arch, model_config, FORMAT).values():
        own_names = [name for name in _possible_names(arch, model_config, item.keys[0]) if name in names]
        tied_names = [
            name for name in _tied_names(arch, model_config, item.keys[0]) if name in names and name not in own_names
        ]
        first, *duplicates = (*own_names, *tied_names) or (item.name,)
        located[item.name] = StoredName(first, tuple(duplicates))
    return located


def find_common_prefix(arch: Architecture, model_config: ModelConfig, names: Collection[str]) -> Renaming:
    """Returns how a file's names become the family's, if all have one more prefix or lack the base model's."""

    def count_matches(renamed: Collection[str]) -> int:
        known = set(renamed)
        config = detect_optional_parts(arch, model_config, known)
        return sum(stored.name in known for stored in locate_tensors(arch, config, known).values())

    return find_renaming(names, _base_prefix(arch), count_matches)


def _base_prefix(arch: Architecture) -> str:
    """Returns the prefix that the names of the layers share, with which a base model's names may have to begin."""
    layers = [param.locations[FORMAT].name for param in arch.params if param.in_layer]
    parts = common_parts(layers)
    return f"{parts[0]}." if len(parts) > 1 and not arch.base_prefixes.get(FORMAT) else ""


def find_tied_sets(
    arch: Architecture, located: Mapping[str, StoredName], stored: Iterable[fused_tensors.StoredTensor]
) -> list[set[str]]:
    """Returns the sets of a file's names that may be one tensor: duplicates, and what the architecture ties."""
    by_key = {key: located[item.name] for item in stored for key in item.keys}
    sets = [{name.name, *name.duplicates} for name in located.values()]
    pairs = ((param.key, param.tied_to) for param in arch.params if param.tied_to)
    return sets + [{by_key[one].name, by_key[other].name} for one, other in pairs if one in by_key and other in by_key]


def _possible_names(arch: Architecture, model_config: ModelConfig, key: str) -> list[str]:
    """Returns every name that a file may use for a key, the current one first."""
    names = [arch.stored_name(key, model_config, FORMAT), _fill_numbers(arch.param(key).locations[FORMAT].name, key)]
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
            name, base = param.locations[FORMAT].name, arch.base_prefixes.get(FORMAT, "")
            yield name
            if base:
                # A file whose names all have one more prefix, equal to the base model's.
                yield base + name


def _fill_numbers(name: str, key: str) -> str:
    return name.format(*key_indices(key))

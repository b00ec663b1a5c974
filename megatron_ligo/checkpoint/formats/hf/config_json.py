"""Hugging Face config.json to ModelConfig and back, driven by the architecture's table.

A key that a config leaves out has its family's default in transformers, which is imported only then. What each key
means is in config_keys.py; a key that is not there is refused, unless its value is empty or the user accepts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path

import torch

from megatron_ligo import arch as architectures
from megatron_ligo.arch import other_families
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_params import ACTIVATION_SYNONYMS
from megatron_ligo.arch.ffn_ratio import ffn_ratio_of, ffn_size_of
from megatron_ligo.arch.model_config import ModelConfig, implied_head_sizes, positions_per_image
from megatron_ligo.checkpoint.formats.hf import layer_patterns, rope_parameters
from megatron_ligo.checkpoint.formats.hf.config_keys import LABELS, key_table
from megatron_ligo.checkpoint.formats.hf.transformers_config import load_transformers_config
from megatron_ligo.checkpoint.source_keys import (
    NO_KEYS,
    AcceptedKeys,
    KeyTable,
    describe_value,
    is_empty,
    is_same_value,
)
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

CONFIG = "config.json"
# The layers whose outputs the backbone class returns, by number.
STAGE_NAMES = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
# Harmless keys that are not copied into a written config: they would describe another file, or another model's sizes.
NOT_CARRIED = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "n_ctx",
    "max_sequence_length",
    *STAGE_NAMES,
)
# The model_types that transformers loads only if num_heads divides hidden_size, whatever head_dim is.
HEADS_DIVIDE = ("llama", "arcee", "gemma2", "gemma3_text", "vaultgemma")
ROPE_FIELDS = ("rope_base", "rope_scaling", "rotary_fraction", "window_rope_base")
# The annotations in ModelConfig that are numbers or booleans.
FIELD_TYPES = {"int": int, "float": float, "bool": bool, "float | None": float, "int | None": int}
MAY_BE_ZERO = ("num_token_types", "position_padding", "position_offset", "query_scaling_beta", "num_registers")
ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")
# Keys that hold a length, or the lengths of two equal sides.
SQUARES = ("image_size", "patch_size")
# None means a family without images, padding among its positions or a scale of its own: other families must state them.
NEVER_NULL = (
    "image_size", "patch_size", "num_channels", "position_padding", "attention_scale", "attention_scale_dim",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(path: Path) -> dict:
    """Reads a JSON object from a checkpoint's config file. Raises CheckpointError for anything else."""
    try:
        config = read_json(path)
    except FileNotFoundError:
        hint = "Write the model's there: model.config.save_pretrained(folder). Accelerate's save_state writes none."
        raise CheckpointError(Problem(f"{path}", "the checkpoint's config", "nothing there", hint)) from None
    except ValueError as error:
        raise CheckpointError(Problem(f"{path}", "valid JSON", f"{error}")) from None
    if not isinstance(config, dict):
        raise CheckpointError(Problem(f"{path}", "a JSON object", type(config).__name__))
    return config


def find_architecture(config: Mapping, where: str) -> Architecture:
    """Returns the architecture of a config's `model_type`. Raises CheckpointError for an unknown one."""
    known = {name: arch for arch in architectures.architectures().values() for name in arch.model_types}
    name = config.get("model_type")
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(other_families.explain(f"{where}: model_type", name, known))
    return known[name]


def parse_model_config(config: Mapping, where: str, accepted: AcceptedKeys = NO_KEYS) -> ModelConfig:
    """Parses the sizes in a config. Raises CheckpointError with everything that the table cannot express."""
    arch = find_architecture(config, where)
    errors = ErrorCollector(f"{where} describes a model that this program does not support", CheckpointError)
    config = _renew(_unify_activations(config), arch, where)
    key_table(config["model_type"]).check(config, accepted, errors)
    _check_classes(config, arch, accepted, errors)
    config = _resolve_names(config, arch, errors)
    sizes: dict[str, object] = {"arch": arch.name, "model_type": config["model_type"]}
    sizes |= _optional_parts(config, arch) | arch.implied_sizes.get(config["model_type"], {})
    if layer_patterns.has_no_window(config, arch):
        sizes["sliding_window"] = None
    for key, name in arch.hf_fields.items():
        if name not in ROPE_FIELDS and name not in sizes:
            sizes[name] = _config_value(config, key, arch, where)
    if "rope_base" in arch.hf_fields.values():
        sizes |= rope_parameters.parse_rope(config, arch, where, errors)
    for name, other in arch.coupled_fields.get(config["model_type"], {}).items():
        sizes[name] = sizes[other]
    if arch.ffn_ratio_key:
        sizes["ffn_size"] = _ffn_size(config, arch, sizes, where, errors)
    if sizes.get("has_gate"):
        sizes["activation"] = arch.gate_activation
    _fill_implied_sizes(sizes)
    _check_types(sizes, errors)
    _check_repetitions(config, arch, sizes, errors)
    for name, known in arch.choices.items():
        if sizes[name] not in known:
            errors.add(name, f"one of {', '.join(map(str, known))}", repr(sizes[name]))
    if arch.hf_window_both_ways and type(sizes["sliding_window"]) is int:
        sizes["sliding_window"] = sizes["sliding_window"] // 2 + 1
    sizes |= layer_patterns.parse_patterns(config, arch, sizes, where, errors)
    errors.raise_if_any()
    try:
        return ModelConfig.from_json(sizes)
    except ConfigError as error:
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")


def _check_classes(config: Mapping, arch: Architecture, accepted: AcceptedKeys, errors: ErrorCollector) -> None:
    """Adds an error for a named class that computes something else, or that belongs to another family."""
    classes = arch.model_types[config["model_type"]]
    known, stems = ", ".join(classes), {_class_stem(name) for name in classes}
    named = config.get("architectures")
    for name in map(str, named) if isinstance(named, list) else ():
        if name in arch.refused_classes:
            errors.add("architectures", known, f"{name}: {arch.refused_classes[name]}")
        elif _class_stem(name) not in stems and not accepted.accepts("architectures", named):
            found = f"{name}, a class of another family"
            errors.add("architectures", known, found, "A changed model_type does not change the network.")


def _class_stem(name: str) -> str:
    """Returns the family in the name of a class, in small letters: "llama" for LlamaForCausalLM."""
    for end in ("For", "LMHead", "Model"):
        name = name.split(end)[0]
    return name.lower()


def _unify_activations(config: Mapping) -> dict:
    """Returns a config with one name for each activation function."""
    names = {key: config[key] for key in ACTIVATION_FIELDS if isinstance(config.get(key), str)}
    return {**config, **{key: ACTIVATION_SYNONYMS.get(name, name) for key, name in names.items()}}


def _renew(config: dict, arch: Architecture, where: str) -> dict:
    """Returns a config with the newer keys of a family in place of older ones that state the same network."""
    for older, newer in arch.hf_older_forms:
        # Defaults of the class alone: other keys may be such that transformers refuses the config.
        stated = {key: config[key] for key in ("model_type", *older) if key in config}
        if all(is_same_value(_config_value(stated, key, arch, where), value) for key, value in older.items()):
            return {**config, **newer}
    return config


def _resolve_names(config: Mapping, arch: Architecture, errors: ErrorCollector) -> dict:
    """Returns the keys that are read, with one name for each size, and one number for equal sides."""
    fields = key_table(config["model_type"]).fields
    resolved = {key: value for key, value in config.items() if key in fields}
    for alias, key in arch.hf_aliases.items():
        if alias in resolved:
            value = resolved.pop(alias)
            if not is_same_value(resolved.setdefault(key, value), value):
                hint = "transformers reads both into one size: remove the wrong one."
                errors.add(alias, f"{describe_value(resolved[key])}, as {key} states", describe_value(value), hint)
    for key in SQUARES:
        sides = resolved.get(key)
        if isinstance(sides, list) and len(sides) == 2 and is_same_value(*sides):
            resolved[key] = sides[0]
    return resolved


def _check_repetitions(config: Mapping, arch: Architecture, sizes: Mapping, errors: ErrorCollector) -> None:
    """Adds an error for a key that states a size a second time, and otherwise."""
    first = {name: key for key, name in reversed(arch.hf_fields.items())}
    again = {key: name for key, name in arch.hf_fields.items() if first[name] != key}
    for key, name in (again | {"head_dim": "head_dim"}).items():
        if config.get(key) is not None and name in sizes and not is_same_value(config[key], sizes[name]):
            errors.add(key, f"none, or {sizes[name]}, which follows from other sizes", describe_value(config[key]))


def _optional_parts(config: Mapping, arch: Architecture) -> dict[str, bool]:
    """Returns which optional parts the model class named in a config has."""
    classes = arch.model_types[config["model_type"]]
    named = config.get("architectures")
    named = [name for name in named if str(name) in classes] if isinstance(named, list) else []
    class_parts = classes[named[0] if named else next(iter(classes))]
    return {part: part in class_parts for part in arch.optional_parts(config["model_type"])}


def _config_value(config: Mapping, key: str, arch: Architecture, where: str) -> object:
    """Returns a config's value for a key, or its family's default if the config leaves it out."""
    # Most families default to hidden_size / num_heads.
    if key in config or (key == "head_dim" and not arch.own_head_dim):
        return config.get(key)
    return getattr(load_transformers_config(config, where), key, None)


def _ffn_size(config: Mapping, arch: Architecture, sizes: Mapping, where: str, errors: ErrorCollector) -> int | None:
    """Returns the feed-forward size that a ratio states. Adds an error for a ratio that is no positive integer."""
    ratio, hidden = _config_value(config, arch.ffn_ratio_key, arch, where), sizes.get("hidden_size")
    if type(ratio) is not int or ratio < 1:
        errors.add(arch.ffn_ratio_key, "a positive int", describe_value(ratio))
        return None
    return ffn_size_of(hidden, ratio, sizes.get("has_gate") is True) if type(hidden) is int else None


def _fill_implied_sizes(sizes: dict) -> None:
    """Fills in sizes that follow from others if a config leaves them out, or null."""
    hidden, heads, image, patch = (sizes.get(key) for key in ("hidden_size", "num_heads", "image_size", "patch_size"))
    if all(type(size) is int and size > 0 for size in (image, patch)):
        sizes["max_positions"] = positions_per_image(image, patch, sizes["has_distillation"])
    if not all(type(size) is int and size > 0 for size in (hidden, heads)):
        return
    for name, value in implied_head_sizes(hidden, heads).items():
        if sizes.get(name) is None:
            sizes[name] = value


def _check_types(sizes: dict, errors: ErrorCollector) -> None:
    """Adds an error for each value of a wrong type or range: JSON may hold any value under any key."""
    for field in fields(ModelConfig):
        if field.name not in sizes and field.default is not MISSING:
            continue
        expected_type = FIELD_TYPES.get(field.type)
        if expected_type is float and type(sizes.get(field.name)) is int:
            sizes[field.name] = float(sizes[field.name])
        value = sizes.get(field.name, field.default)
        is_absent = value is None and "None" in field.type and not (field.name in NEVER_NULL and field.name in sizes)
        if expected_type is None or is_absent or (field.name in MAY_BE_ZERO and value == 0):
            continue
        if type(value) is not expected_type or (expected_type is not bool and not 0 < value < float("inf")):
            errors.add(
                field.name,
                "true or false" if expected_type is bool else f"a positive {expected_type.__name__}",
                repr(value),
            )


def parse_carried(config: Mapping) -> dict[str, object]:
    """Returns the keys of a config that conversions copy unchanged: harmless ones, and unknown ones without a value."""
    find_architecture(config, CONFIG)
    return _select_carried(config, key_table(config["model_type"]))


def check_carried(
    model_config: ModelConfig, carried: Mapping[str, object], where: str, accepted: AcceptedKeys
) -> dict[str, object]:
    """Returns the keys that a record carries for a config.json, less those that the user accepts.

    Raises CheckpointError for keys that `parse_carried` would not carry: in a written config they would change it.
    """
    table = key_table(model_config.model_type)
    errors = ErrorCollector(f"{where} carries keys that change the model", CheckpointError)
    table.check(carried, accepted, errors)
    for key, value in carried.items():
        if key in table.fields and key != LABELS and not is_empty(value):
            errors.add(key, "a size among the sizes only", describe_value(value))
    errors.raise_if_any()
    return _select_carried(carried, table)


def select_carried(carried: Mapping[str, object], model_type: str) -> dict[str, object]:
    """Returns the carried keys that a config of another `model_type` carries too."""
    return _select_carried(carried, key_table(model_type))


def _select_carried(config: Mapping[str, object], table: KeyTable) -> dict[str, object]:
    """Returns the keys that are harmless, the labels' names, and unknown keys without a value."""
    return {
        key: value
        for key, value in config.items()
        if key not in NOT_CARRIED and (key == LABELS or key in table.harmless or (key not in table and is_empty(value)))
    }


def to_hf_config(model_config: ModelConfig, carried: Mapping[str, object], dtype: torch.dtype) -> dict:
    """Builds a config.json from which transformers 5 and earlier versions compute the same numbers.

    Raises CheckpointError if the family's config cannot express the sizes.
    """
    arch = architectures.get(model_config.arch)
    errors = ErrorCollector(f"a {model_config.model_type} config cannot express this model", CheckpointError)
    for name, value in arch.implied_sizes.get(model_config.model_type, {}).items():
        if getattr(model_config, name) != value:
            errors.add(name, repr(value), repr(getattr(model_config, name)), "Another model_type may express it.")
    arch.check(model_config, errors)
    layer_patterns.check_patterns(model_config, arch, errors)
    errors.raise_if_any()
    name = str(dtype).removeprefix("torch.")
    config = {"architectures": [arch.hf_class(model_config)], "model_type": model_config.model_type}
    if arch.reads_images:
        config |= {**carried, **_label_names(carried, model_config.vocab_size)}
    else:
        # Unknown token ids are written as null: left out, they would be the family's defaults.
        config |= {**dict.fromkeys(TOKEN_IDS), **carried}
    # A copy: transformers modifies the scaling that it is given.
    sizes = model_config.to_json()
    # A family with a key for the scale has no usual one.
    sizes["attention_scale"] = model_config.score_scale
    sizes["attention_scale_dim"] = model_config.attention_scale_dim or model_config.head_dim
    stated = {key: sizes[field] for key, field in arch.hf_fields.items()} | arch.required_hf_values
    if arch.ffn_ratio_key:
        stated[arch.ffn_ratio_key] = ffn_ratio_of(model_config)
    # vLLM lets Mistral attend to everything if it reads Qwen's key for no window.
    foreign = arch.foreign_hf_keys.get(model_config.model_type, ())
    config |= {key: value for key, value in stated.items() if key not in foreign}
    if arch.hf_window_both_ways:
        reach = (model_config.sliding_window or model_config.max_positions + 1) - 1
        config |= {key: 2 * reach for key, field in arch.hf_fields.items() if field == "sliding_window"}
    config |= layer_patterns.to_pattern_keys(model_config, arch) | rope_parameters.to_rope_keys(model_config, arch)
    return config | {"dtype": name, "torch_dtype": name}


def explain_transformers_refusal(model_config: ModelConfig) -> str:
    """Explains why transformers refuses a config of these sizes; "" if it loads it."""
    if model_config.model_type not in HEADS_DIVIDE or model_config.hidden_size % model_config.num_heads == 0:
        return ""
    expected = (
        f"a divisor of hidden_size = {model_config.hidden_size} (transformers loads no other {model_config.model_type})"
    )
    hint = "Choose num_heads that divides hidden_size, or leave 'hf' out of handoff.formats."
    return Problem("hf: num_heads", expected, model_config.num_heads, hint)


def _label_names(carried: Mapping[str, object], count: int) -> dict[str, dict]:
    """Returns the names of the labels; unnamed ones get transformers' default names."""
    stated = carried.get(LABELS)
    stated = stated.items() if isinstance(stated, dict) else ()
    known = {int(number): name for number, name in stated if str(number).isdecimal()}
    names = {number: known.get(number, f"LABEL_{number}") for number in range(count)}
    return {
        LABELS: {str(number): name for number, name in names.items()},
        "label2id": {name: number for number, name in names.items()},
    }

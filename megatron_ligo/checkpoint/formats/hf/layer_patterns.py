"""Which layers of a Hugging Face config.json have a window, chunks or rotary positions.

`Architecture.hf_pattern_keys` names the keys. `layer_types`, `no_rope_layers` and `layer_rope_theta` (the rotary base,
or 0 for none) are lists with an entry for each layer. Where a config leaves one out, transformers derives it from the
other keys.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.rope_parameters import FULL, WINDOW
from megatron_ligo.checkpoint.formats.hf.transformers_config import load_transformers_config
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import ErrorCollector

ROPE_BASES = "layer_rope_theta"
TYPES, NO_ROPE, USE_WINDOW, FIRST_WINDOW = "layer_types", "no_rope_layers", "use_sliding_window", "max_window_layers"
CHUNKS, EXPERTS = "chunked_attention", "moe_layers"
# transformers 4 and 5.
FULL_NAMES = (FULL, "attention")


def has_no_window(config: Mapping, arch: Architecture) -> bool:
    """True if a config switches its window off."""
    keys = arch.hf_pattern_keys.get(config["model_type"], ())
    return USE_WINDOW in keys and not config.get(USE_WINDOW, False)


def parse_patterns(
    config: Mapping, arch: Architecture, sizes: Mapping, where: str, errors: ErrorCollector
) -> dict[str, object]:
    """Parses the flags of layers. sizes: those that are read already. Adds an error for wrong values."""
    keys = arch.hf_pattern_keys.get(config["model_type"], ())
    num_layers, patterns = sizes.get("num_layers"), {}
    if type(num_layers) is not int or num_layers < 1:
        return patterns
    if USE_WINDOW in keys and not isinstance(config.get(USE_WINDOW, False), bool):
        errors.add(USE_WINDOW, "true or false", describe_value(config[USE_WINDOW]))
        return patterns
    if EXPERTS in keys:
        _check_no_experts(_list_of(config, EXPERTS, where), num_layers, errors)
    if "attention_chunk" in arch.hf_fields.values():
        patterns |= _parse_chunks(_list_of(config, TYPES, where), num_layers, sizes, errors)
    elif arch.needs_window and sizes.get("sliding_window") is None:
        errors.add("sliding_window", "a number of tokens", "null")
    elif TYPES not in keys or sizes.get("sliding_window") is None:
        _check_one_type(config, sizes, errors)
        if TYPES in keys and USE_WINDOW not in keys and WINDOW in (_list_of(config, TYPES, where) or ()):
            errors.add("sliding_window", "a number of tokens: some layers have a window", "null")
    else:
        types = _list_of(config, TYPES, where)
        names = (*FULL_NAMES, WINDOW)
        if not isinstance(types, list) or len(types) != num_layers or not all(name in names for name in types):
            errors.add(TYPES, f"{FULL} or {WINDOW} for each of {num_layers} layers", describe_value(types))
        else:
            patterns["window_layers"] = tuple(name == WINDOW for name in types)
            if arch.rotates_in_windows_only:
                patterns["rope_layers"] = patterns["window_layers"]
    if NO_ROPE in keys:
        flags = _list_of(config, NO_ROPE, where)
        if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
            errors.add(NO_ROPE, f"0 or 1 for each of {num_layers} layers", describe_value(flags))
        else:
            patterns["rope_layers"] = tuple(bool(flag) for flag in flags[:num_layers])
    if ROPE_BASES in keys:
        patterns |= _parse_bases(_list_of(config, ROPE_BASES, where), num_layers, errors)
    return patterns


def _parse_chunks(types: object, num_layers: int, sizes: Mapping, errors: ErrorCollector) -> dict[str, object]:
    """Parses which layers attend in chunks, in a family whose class builds the chunks' mask for each model."""
    if sizes.get("attention_chunk") is None:
        errors.add("attention_chunk_size", "a number of tokens", "null")
    if not isinstance(types, list) or len(types) != num_layers or not all(name in (FULL, CHUNKS) for name in types):
        errors.add(TYPES, f"{FULL} or {CHUNKS} for each of {num_layers} layers", describe_value(types))
        return {}
    return {"chunk_layers": tuple(name == CHUNKS for name in types)}


def _check_no_experts(layers: object, num_layers: int, errors: ErrorCollector) -> None:
    """Adds an error if a config names layers with experts, in a family that is known without."""
    numbers = layers if isinstance(layers, list) else [None]
    if not all(type(layer) is int and layer >= num_layers for layer in numbers):
        hint = "This family is known without experts, as moe_layers = [] states."
        errors.add(EXPERTS, "no layer", describe_value(layers), hint)


def _parse_bases(bases: object, num_layers: int, errors: ErrorCollector) -> dict[str, object]:
    """Parses a rotary base for each layer, 0 for none, which wins over the config's only one."""
    is_list = isinstance(bases, list) and len(bases) == num_layers
    if not is_list or not all(type(base) in (int, float) and 0 <= base < float("inf") for base in bases):
        errors.add(ROPE_BASES, f"a number for each of {num_layers} layers", describe_value(bases))
        return {}
    stated = sorted({float(base) for base in bases if base})
    if len(stated) != 1:
        errors.add(ROPE_BASES, "one base, or 0 for no rotary positions", describe_value(bases))
        return {}
    return {"rope_base": stated[0], "rope_layers": tuple(base != 0 for base in bases)}


def _list_of(config: Mapping, key: str, where: str) -> object:
    stated = config.get(key)
    # Llama 4's class completes an empty list, too.
    return getattr(load_transformers_config(config, where), key, None) if stated in (None, []) else stated


def _check_one_type(config: Mapping, sizes: Mapping, errors: ErrorCollector) -> None:
    """Adds an error if a config without a pattern states one."""
    types = config.get(TYPES)
    expected = set(FULL_NAMES) if sizes.get("sliding_window") is None else {WINDOW}
    if types is not None and (not isinstance(types, list) or not types or not set(map(str, types)) <= expected):
        errors.add(TYPES, f"{max(expected, key=len)} in every layer", describe_value(types))


def check_patterns(model_config: ModelConfig, arch: Architecture, errors: ErrorCollector) -> None:
    """Adds an error for each pattern of a model that its `model_type` cannot state."""
    names = arch.hf_pattern_keys.get(model_config.model_type, ())
    if arch.needs_window and model_config.sliding_window is None:
        errors.add("sliding_window", "a number of tokens, and a layer that has it", None)
    if arch.rotates_in_windows_only:
        expected = model_config.window_layers
        if model_config.rope_layers != expected:
            errors.add("rope_layers", f"{expected}, the layers with a window", model_config.rope_layers)
    for field in ("sliding_window", "attention_chunk"):
        if getattr(model_config, field) is not None and field not in arch.hf_fields.values():
            errors.add(field, "none in this family", getattr(model_config, field))
    rope_keys = {TYPES} if arch.rotates_in_windows_only else {NO_ROPE, ROPE_BASES}
    for field, keys in (("window_layers", {TYPES}), ("chunk_layers", {TYPES}), ("rope_layers", rope_keys)):
        if getattr(model_config, field) is not None and not keys & {*names}:
            errors.add(field, "the same in every layer", describe_value(getattr(model_config, field)))
    if model_config.query_scaling_beta and not (arch.scales_queries or arch.scales_unrotated_queries):
        errors.add("query_scaling_beta", "0: queries are not scaled", model_config.query_scaling_beta)
    if arch.scales_unrotated_queries and model_config.query_scaling_length is None:
        errors.add("query_scaling_length", "a number of tokens", None)
    if model_config.has_window_positions and not arch.hf_rope_by_layer_type:
        errors.add("window_rope_base", "none: one base for all layers", model_config.window_rope_base)


def to_pattern_keys(model_config: ModelConfig, arch: Architecture) -> dict[str, object]:
    """Returns the keys of a config.json that state a model's patterns."""
    names = arch.hf_pattern_keys.get(model_config.model_type, ())
    kinds = [model_config.layer_kind(layer) for layer in range(model_config.num_layers)]
    windows = [kind.window is not None for kind in kinds]
    limited = CHUNKS if model_config.attention_chunk is not None else WINDOW
    rotates = model_config.rope_layers or (True,) * model_config.num_layers
    values = {
        TYPES: [FULL if kind.window is None and kind.chunk is None else limited for kind in kinds],
        EXPERTS: [],
        NO_ROPE: [int(flag) for flag in rotates],
        ROPE_BASES: [model_config.rope_base if flag else 0 for flag in rotates],
        USE_WINDOW: any(windows),
        FIRST_WINDOW: windows.index(True) if any(windows) else model_config.num_layers,
    }
    stated = {key: value for key, value in values.items() if key in names}
    is_built_anyway = TYPES in names and USE_WINDOW not in names and not arch.rotates_in_windows_only
    is_built_anyway = is_built_anyway and "sliding_window" in arch.hf_fields
    if is_built_anyway and model_config.sliding_window is None:
        # These classes of transformers build the window's mask whether a layer has it or not.
        stated["sliding_window"] = model_config.max_positions
    if "attention_chunk" in arch.hf_fields.values() and model_config.attention_chunk is None:
        stated["attention_chunk_size"] = model_config.max_positions
    return stated

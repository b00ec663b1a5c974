"""The rotary positions of a Hugging Face config.json, read in the order of transformers.

transformers 4 knows `rope_theta` and `rope_scaling`; transformers 5 writes both into `rope_parameters`, and reads
either. `rope_scaling` wins as a whole where both stand, so a base beside it counts only at the top level. Configs are
written in the first form alone: every version reads it, and a scaling that a user adds to it takes effect.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch import rope_scaling
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.transformers_config import load_transformers_config
from megatron_ligo.common.errors import ErrorCollector

FULL, WINDOW = "full_attention", "sliding_attention"
PARAMETERS, SCALING, FRACTION = "rope_parameters", "rope_scaling", "partial_rotary_factor"
QUERY_SCALING = "llama_4_scaling_beta"
# The keys of a config that `parse_rope` reads, besides those that the families name.
ROPE_KEYS = (PARAMETERS, SCALING, "rope_theta", FRACTION, rope_scaling.ORIGINAL_LENGTH)


def parse_rope(config: Mapping, arch: Architecture, where: str, errors: ErrorCollector) -> dict[str, object]:
    """Parses `rope_base`, `rope_scaling` and (in families that have one) `rotary_fraction`.

    The model's config checks the values of the scaling.
    """
    keys = {field: key for key, field in arch.hf_fields.items()}
    if arch.hf_rope_by_layer_type:
        return _parse_rope_by_type(config, where, errors)
    if arch.scales_queries:
        return _parse_scaled_queries(config, where, errors)
    name = SCALING if config.get(SCALING) else PARAMETERS
    parameters = config.get(name) or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        errors.add(name, "one set of plain values for all layers", repr(parameters)[:80])
        return {"rope_base": 1.0}
    scaling = dict(parameters)
    if arch.rope_kinds:
        _rename_kind(scaling, arch, errors)
    partial = scaling.pop(FRACTION, config.get(keys.get("rotary_fraction", FRACTION)))
    base = scaling.pop("rope_theta", config.get(keys["rope_base"]))
    if base is None:
        base = load_transformers_config(config, where).rope_parameters.get("rope_theta")
    if base is None:
        errors.add(keys["rope_base"], "a positive number", "null")
        base = 1.0
    fraction = {}
    if "rotary_fraction" in keys:
        if partial is None:
            partial = load_transformers_config(config, where).rope_parameters.get(FRACTION)
        if partial is None:
            errors.add(keys["rotary_fraction"], "a number above 0 and at most 1", "null")
            partial = 1.0
        fraction = {"rotary_fraction": partial}
    elif partial not in (None, 1):
        errors.add(FRACTION, "1 (rotary positions on the whole head)", repr(partial))
    if scaling.get("rope_type", scaling.get("type")) == "proportional" and partial in (None, 1):
        scaling = _as_linear(scaling)
    original = config.get(rope_scaling.ORIGINAL_LENGTH, arch.original_length)
    if original is not None and rope_scaling.has_original_length(scaling):
        # The top level wins over the scaling in transformers, and so does the default of a class that declares it.
        scaling[rope_scaling.ORIGINAL_LENGTH] = original
    return {"rope_base": base, "rope_scaling": scaling, **fraction}


def _parse_scaled_queries(config: Mapping, where: str, errors: ErrorCollector) -> dict[str, object]:
    """Parses the positions of a family that states its queries' factor beside them, as transformers completes them."""
    completed = load_transformers_config(config, where)
    # The network does it again: only then a length at the config's top level wins over the scaling's.
    completed.standardize_rope_params()
    scaling = dict(completed.rope_parameters)
    base, beta = scaling.pop("rope_theta"), scaling.pop(QUERY_SCALING, None)
    # A note of the family's: transformers does not read it there.
    scaling.pop("max_position_embeddings", None)
    if beta is None:
        errors.add(f"{PARAMETERS}.{QUERY_SCALING}", "a number (transformers computes nothing without it)", "none")
    return {"rope_base": base, "rope_scaling": scaling, "query_scaling_beta": beta or 0.0}


def _rename_kind(scaling: dict, arch: Architecture, errors: ErrorCollector) -> None:
    """Replaces a scaling's kind by the one that the family's class takes it for, or adds an error."""
    stated = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(stated, str) or stated not in arch.rope_kinds:
        errors.add(SCALING, f"one of {', '.join(arch.rope_kinds)}: the class takes no other", repr(stated)[:60])
        return
    if scaling:
        scaling.pop("type", None)
        scaling["rope_type"] = arch.rope_kinds[stated]


def _parse_rope_by_type(config: Mapping, where: str, errors: ErrorCollector) -> dict[str, object]:
    """Parses the positions of layers with and without the window, as transformers completes them."""
    by_type = load_transformers_config(config, where).rope_parameters
    common, window = (dict(by_type[name]) for name in (FULL, WINDOW))
    base, window_base = common.pop("rope_theta"), None
    if window != {"rope_theta": base, **common}:
        window_base = window.pop("rope_theta")
        if window != {"rope_type": "default"}:
            errors.add(f"{PARAMETERS}.{WINDOW}", f"unscaled positions, or those of {FULL}", repr(window)[:80])
    return {"rope_base": base, "rope_scaling": common, "window_rope_base": window_base}


def _to_rope_by_type(model_config: ModelConfig, arch: Architecture) -> dict[str, object]:
    common = {"rope_theta": model_config.rope_base, **(model_config.rope_scaling or {"rope_type": "default"})}
    own = {"rope_theta": model_config.window_rope_base, "rope_type": "default"}
    window = own if model_config.has_window_positions else dict(common)
    # transformers 4 knows the bases alone.
    older = {key: window["rope_theta"] for key, field in arch.hf_fields.items() if field == "window_rope_base"}
    return {PARAMETERS: {FULL: common, WINDOW: window}, **older}


def to_rope_keys(model_config: ModelConfig, arch: Architecture) -> dict[str, object]:
    """Returns the keys of a config.json besides those that the families name."""
    if arch.hf_rope_by_layer_type:
        return _to_rope_by_type(model_config, arch)
    if arch.scales_queries:
        base, beta = model_config.rope_base, model_config.query_scaling_beta
        return {
            PARAMETERS: {"rope_theta": base, **(model_config.rope_scaling or {}), QUERY_SCALING: beta},
            SCALING: None,
        }
    scaling = model_config.rope_scaling
    if rope_scaling.scaling_kind(scaling) != "longrope":
        return {}
    # transformers 4 chooses between the two lists by this key alone.
    keys = {rope_scaling.ORIGINAL_LENGTH: scaling[rope_scaling.ORIGINAL_LENGTH]}
    if arch.rope_kinds and rope_scaling.follows_from_lengths(scaling, model_config.max_positions):
        # Phi-3's class of transformers 4 takes these three and no other key.
        keys[SCALING] = {"type": "longrope", **{name: scaling[name] for name in rope_scaling.LISTS}}
    return keys


def _as_linear(scaling: dict) -> dict:
    """Returns the linear scaling that a proportional one is if the whole head rotates."""
    rest = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
    return {"factor": 1.0, **rest, "rope_type": "linear"}

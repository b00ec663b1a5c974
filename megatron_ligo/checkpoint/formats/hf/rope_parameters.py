"""The rotary positions of a Hugging Face config.json: rope_parameters, rope_theta, rope_scaling and rotary fraction."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.transformers_config import load_transformers_config
from megatron_ligo.common.errors import ErrorCollector


def parse_rope(config: Mapping, arch: Architecture, where: str, errors: ErrorCollector) -> dict[str, object]:
    """Parses `rope_base`, `rope_scaling` and (in families that have one) `rotary_fraction`.

    Reads both forms: rope_parameters (transformers 5), and separate keys.
    """
    keys = {field: key for key, field in arch.hf_fields.items()}
    parameters = config.get("rope_parameters")
    scaling = config.get("rope_scaling") if parameters is None else parameters
    scaling = {} if scaling is None else scaling
    if not isinstance(scaling, dict) or any(isinstance(value, dict) for value in scaling.values()):
        errors.add("rope_parameters", "one set of plain values for all layers", repr(scaling))
        return {"rope_base": 1.0}
    scaling = dict(scaling)
    partial = scaling.pop("partial_rotary_factor", config.get(keys.get("rotary_fraction", "partial_rotary_factor")))
    base = scaling.pop("rope_theta", config.get(keys["rope_base"]))
    if base is None:
        base = load_transformers_config(config, where).rope_parameters["rope_theta"]
    fraction = {}
    if "rotary_fraction" in keys:
        if partial is None:
            partial = load_transformers_config(config, where).rope_parameters["partial_rotary_factor"]
        fraction = {"rotary_fraction": partial}
    elif partial not in (None, 1):
        errors.add("partial_rotary_factor", "1 (rotary positions on the whole head)", repr(partial))
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    unscaled = scaling.get("rope_type", "default") == "default"
    return {"rope_base": base, "rope_scaling": None if unscaled else scaling, **fraction}


def to_rope_parameters(model_config: ModelConfig) -> dict[str, object]:
    """Returns the config.json keys that transformers 5 reads rotary positions from."""
    arch = architectures.get(model_config.arch)
    parameters = {
        "rope_type": "default",
        "rope_theta": model_config.rope_base,
        **(model_config.rope_scaling or {}),
    }
    if "rotary_fraction" in arch.hf_fields.values():
        parameters["partial_rotary_factor"] = model_config.rotary_fraction
    return {"rope_parameters": parameters}

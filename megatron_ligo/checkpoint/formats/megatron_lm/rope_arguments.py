"""The rotary positions in Megatron-LM's run arguments."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ErrorCollector

# The constants of Llama 3.1, the only ones in Megatron-core. The factor is an argument.
LLAMA3_CONSTANTS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FIXED_ARGS = {"rotary_percent": 1.0, "rotary_interleaved": False}


def check_rope_args(args: Mapping[str, object], errors: ErrorCollector) -> None:
    """Adds an error if the arguments describe positions that a Llama has not."""
    if args.get("position_embedding_type", "rope") != "rope" and not args.get("use_rotary_position_embeddings"):
        errors.add("position_embedding_type", "rope", repr(args["position_embedding_type"]))


def parse_rope_args(args: Mapping[str, object]) -> dict[str, object]:
    """Returns the `rope_base` and `rope_scaling` that the arguments describe."""
    return {"rope_base": float(args["rotary_base"]), "rope_scaling": _parse_rope_scaling(args)}


def to_rope_args(model_config: ModelConfig) -> dict[str, object]:
    """Returns the arguments with which Megatron-LM computes the model's rotary positions."""
    scaling = dict(model_config.rope_scaling or {})
    return {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": False,
        "rotary_base": _to_int_if_whole(model_config.rope_base),
        "use_rope_scaling": bool(scaling),
        "rope_scaling_factor": scaling.get("factor", 8.0),
    }


def _parse_rope_scaling(args: Mapping[str, object]) -> dict | None:
    if not args.get("use_rope_scaling"):
        return None
    return {"rope_type": "llama3", "factor": args.get("rope_scaling_factor", 8.0), **LLAMA3_CONSTANTS}


def _to_int_if_whole(number: float | None) -> float | int | None:
    """Returns an int for a whole number: Megatron-LM's rotary base is one."""
    return int(number) if number is not None and number == int(number) else number

"""Kinds of rotary scaling, and the sizes that their angles depend on.

A scaling is the scaling part of Hugging Face's rope parameters, verbatim.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.model_config import ModelConfig

# Llama 3's published constants, the only ones that Megatron-core supports. The factor varies by model.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Scalings that depend on each pair's frequency only, not on the head size.
SIZE_INDEPENDENT_KINDS = ("default", "linear", "llama3")
# Scalings that do not depend on the number of positions.
LENGTH_INDEPENDENT_KINDS = ("default", "linear")


def scaling_kind(scaling: Mapping | None) -> str:
    """Returns a scaling's kind, under its current or its legacy key; "default" if there is none."""
    scaling = scaling or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def angles_depend_on_length(model_config: ModelConfig) -> bool:
    """True if the rotary angles depend on the number of positions.

    A missing factor or original length defaults to a value derived from it. `dynamic` always uses it.
    """
    scaling = model_config.rope_scaling or {}
    kind = scaling_kind(scaling)
    if kind in LENGTH_INDEPENDENT_KINDS:
        return False
    return kind == "dynamic" or not {"factor", "original_max_position_embeddings"} <= scaling.keys()

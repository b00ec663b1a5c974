"""The scalings of rotary positions: their kinds, the keys of each, and the factor on cos and sin.

A scaling is a dict with Hugging Face's key names and meanings. `normalise` checks one and fills in what transformers
derives from the model's sizes, so that a scaling alone states its frequencies. rope_frequencies.py computes them.

    linear      positions divided by `factor`
    dynamic     NTK: beyond max_positions, the base grows with the length of the sequence
    yarn        long wavelengths interpolated, short ones kept, and a ramp between them in the index of the pair
    llama3      the same with a ramp in the frequency
    longrope    a divisor for each pair: short_factor up to the original length of the sequence, long_factor beyond
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sys import float_info

from megatron_ligo.common.errors import ErrorCollector, did_you_mean

WHERE = "rope_scaling"
ORIGINAL_LENGTH = "original_max_position_embeddings"
# A note of how the model was trained; no implementation reads it.
HARMLESS_KEYS = ("finetuned",)


@dataclass(frozen=True)
class ScalingKind:
    """The keys of one kind."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return ("rope_type", *self.required, *self.optional)


KINDS = {
    "linear": ScalingKind(("factor",)),
    "dynamic": ScalingKind(("factor",)),
    "yarn": ScalingKind(
        ("factor", ORIGINAL_LENGTH),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ScalingKind(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)),
    "longrope": ScalingKind(("short_factor", "long_factor", ORIGINAL_LENGTH), ("attention_factor", "factor")),
}
LISTS = ("short_factor", "long_factor")
# Zero stands for the default in transformers.
MAY_BE_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def scaling_kind(scaling: Mapping | None) -> str:
    """Returns the kind of a normalised scaling; "default" if there is none."""
    return scaling["rope_type"] if scaling else "default"


def has_original_length(scaling: Mapping) -> bool:
    """True if the kind of a scaling, checked or not, has an original length."""
    kind = KINDS.get(str(scaling.get("rope_type", scaling.get("type"))))
    return kind is not None and ORIGINAL_LENGTH in kind.required


def normalise(scaling: Mapping | None, max_positions: int, num_pairs: int, errors: ErrorCollector) -> dict | None:
    """Checks a scaling and returns it with every value that it depends on; None if nothing is scaled.

    Adds an error for an unknown kind, and for each key that is missing, unknown or of a wrong type or range.
    num_pairs: rotary pairs of a head.
    """
    stated = {key: value for key, value in (scaling or {}).items() if key not in HARMLESS_KEYS}
    kind = _pop_kind(stated, errors)
    if kind is None:
        return None
    if kind == "default":
        for key, value in stated.items():
            if value is not None:
                errors.add(f"{WHERE}.{key}", "none: rope_type 'default' scales nothing", repr(value), "Delete the key.")
        return None
    _fill_defaults(kind, stated, max_positions)
    num_problems = len(errors.problems)
    _check_keys(kind, stated, errors)
    _check_values(kind, stated, num_pairs, errors)
    scaling = {"rope_type": kind, **{key: value for key, value in stated.items() if value is not None}}
    if kind == "longrope" and len(errors.problems) == num_problems:
        # Versions of transformers derive it from different lengths.
        scaling["attention_factor"] = attention_factor(scaling)
    return scaling


def _pop_kind(stated: dict, errors: ErrorCollector) -> str | None:
    """Removes a scaling's kind, under its current or its legacy key, and returns it; None if it is unknown."""
    named = [stated.pop(key) for key in ("rope_type", "type") if key in stated]
    kind = named[0] if named else "default"
    if any(other != kind for other in named):
        errors.add(f"{WHERE}: rope_type and type", "the same kind", f"{named[0]!r} and {named[1]!r}"[:80])
        return None
    if not isinstance(kind, str) or kind not in ("default", *KINDS):
        hint = did_you_mean(kind, KINDS) if isinstance(kind, str) else ""
        errors.add(f"{WHERE}: rope_type", f"one of default, {', '.join(KINDS)}", repr(kind)[:60], hint)
        return None
    return kind


def _fill_defaults(kind: str, stated: dict, max_positions: int) -> None:
    """Fills in what transformers derives from the number of positions, and drops what it has defaults for."""
    keys = KINDS[kind].required
    if ORIGINAL_LENGTH in keys and stated.get(ORIGINAL_LENGTH) is None:
        stated[ORIGINAL_LENGTH] = max_positions
    original = stated.get(ORIGINAL_LENGTH)
    # Only an explicit null is derived for yarn: transformers refuses a missing factor.
    derives_factor = kind == "longrope" or (kind == "yarn" and "factor" in stated)
    if derives_factor and stated.get("factor") is None and _is_number(original) and original > 0:
        stated["factor"] = max_positions / original
    if kind == "yarn" and "truncate" in stated and stated["truncate"] is None:
        # transformers takes null for false here.
        stated["truncate"] = False


def _check_keys(kind: str, stated: dict, errors: ErrorCollector) -> None:
    known = KINDS[kind]
    for key in known.required:
        if stated.get(key) is None:
            errors.add(f"{WHERE}.{key}", f"a value, which {kind} needs", "none")
    for key, value in stated.items():
        if key not in known.keys and value is not None:
            hint = did_you_mean(key, known.keys) or "Delete the key if the model does not depend on it."
            errors.add(f"{WHERE}.{key}", f"no such key in {kind}", repr(value)[:60], hint)


def _check_values(kind: str, stated: dict, num_pairs: int, errors: ErrorCollector) -> None:
    for key, value in stated.items():
        if value is None or key not in KINDS[kind].keys:
            continue
        if key in LISTS:
            expected, is_valid = f"{num_pairs} positive numbers, one for each rotary pair", _is_list(value, num_pairs)
        elif key == "truncate":
            expected, is_valid = "true or false", isinstance(value, bool)
        elif key == ORIGINAL_LENGTH:
            expected, is_valid = "a number of positions, 2 or more", _is_number(value) and value >= 2
        elif key in MAY_BE_ZERO:
            expected, is_valid = "a number, 0 or more", _is_number(value) and value >= 0
        else:
            expected, is_valid = "a positive number", _is_number(value) and value > 0
        if not is_valid:
            errors.add(f"{WHERE}.{key}", expected, repr(value)[:60])
    if kind == "dynamic" and num_pairs < 2:
        errors.add(f"{WHERE}: dynamic", "two rotary pairs or more", num_pairs)
    low, high = stated.get("low_freq_factor"), stated.get("high_freq_factor")
    if kind == "llama3" and _is_number(low) and _is_number(high) and not low <= high:
        errors.add(f"{WHERE}.high_freq_factor", f"at least low_freq_factor = {low}", high)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= float_info.max


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(_is_number(x) and x > 0 for x in value)


def depends_on_context(scaling: Mapping | None) -> bool:
    """True if the angles of a normalised scaling depend on the model's number of positions."""
    return scaling_kind(scaling) == "dynamic"


def attention_factor(scaling: Mapping | None) -> float:
    """Returns the factor on cos and sin of a normalised scaling."""
    rule = _ATTENTION_FACTORS.get(scaling_kind(scaling))
    if rule is None:
        return 1.0
    stated = scaling.get("attention_factor")
    return rule(scaling) if stated is None else float(stated)


def follows_from_lengths(scaling: Mapping, max_positions: int) -> bool:
    """True if a normalised longrope is scaled as its two lengths say, whatever factors it states besides."""
    factor = max_positions / scaling[ORIGINAL_LENGTH]
    derived = _longrope_attention_factor({**scaling, "factor": factor})
    return scaling["factor"] == factor and math.isclose(derived, attention_factor(scaling))


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's factor on cos and sin for a context that is `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_attention_factor(scaling: Mapping) -> float:
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return yarn_scale(scaling["factor"], mscale) / yarn_scale(scaling["factor"], mscale_all_dim)
    return yarn_scale(scaling["factor"])


def _longrope_attention_factor(scaling: Mapping) -> float:
    factor = scaling["factor"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(scaling[ORIGINAL_LENGTH]))


_ATTENTION_FACTORS: dict[str, Callable[[Mapping], float]] = {
    "yarn": _yarn_attention_factor,
    "longrope": _longrope_attention_factor,
}

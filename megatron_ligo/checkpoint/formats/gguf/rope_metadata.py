"""Reads a GGUF file's rope scaling as llama.cpp applies it: rules in its metadata, and tables of divisors.

llama.cpp takes a scaling without a type for linear, and a missing factor from its old key. It stores Llama 3's scaling
as a table of its divisors, and longrope as two. Keys that its versions read differently are refused unless they state
what all of them compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_ligo.arch.rope_scaling import ORIGINAL_LENGTH, yarn_scale
from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader
from megatron_ligo.common.errors import ErrorCollector

FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
TABLES = (FACTORS, SHORT_FACTORS, LONG_FACTORS)
# The constants of Llama 3's rule behind a table. Its releases share them; `factor` differs.
LOW, HIGH = 1.0, 4.0
CONTEXTS = (8192, *(2**power for power in (9, 10, 11, 12, 14, 15, 16, 17)))
CLOSE = 1e-5
HINT = "Use the model's Hugging Face files: their config states the rule."


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal of the same fp32 number: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def parse_rope_scaling(
    header: GgufHeader, family: str, num_rotated: int, base: float, errors: ErrorCollector, has_yarn_scale: bool = False
) -> dict | None:
    """Returns the scaling with Hugging Face's keys, or None. Adds an error if they cannot express it.

    num_rotated: features of a head that rotate. has_yarn_scale: see `GgufNetwork`.
    """
    return _RopeParser(header, family, num_rotated, base, errors, has_yarn_scale).parse()


@dataclass(frozen=True)
class _RopeParser:
    header: GgufHeader
    family: str
    num_rotated: int
    base: float
    errors: ErrorCollector
    has_yarn_scale: bool

    def parse(self) -> dict | None:
        has_lists = {SHORT_FACTORS, LONG_FACTORS} <= self.header.tensors.keys()
        # Files of Phi-3 name no type: llama.cpp divides by the lists that it finds.
        default = "longrope" if has_lists else "linear"
        kind = self.header.metadata.get(f"{self.family}.rope.scaling.type", default)
        rule = {"none": self._plain, "linear": self._linear, "yarn": self._yarn, "longrope": self._longrope}
        if not isinstance(kind, str) or kind not in rule:
            self.errors.add("rope.scaling.type", f"one of {', '.join(rule)}", repr(kind)[:60])
            return None
        is_yarn = kind == "yarn"
        for key, neutral in (
            ("yarn_ext_factor", (-1.0, 1.0 if is_yarn else 0.0)),
            ("yarn_beta_fast", (32.0,)),
            ("yarn_beta_slow", (1.0,)),
            ("yarn_log_multiplier", (1.0,) if is_yarn and self.has_yarn_scale else (0.0,)),
            *(() if is_yarn else (("yarn_attn_factor", (1.0,)),)),
        ):
            self._require(f"rope.scaling.{key}", neutral)
        tables = (SHORT_FACTORS, LONG_FACTORS) if kind == "longrope" else () if is_yarn else (FACTORS,)
        for name in TABLES:
            if name in self.header.tensors and name not in tables:
                self.errors.add(name, f"no such table with {kind}", "one", HINT)
        return rule[kind]()

    def _plain(self) -> dict | None:
        """llama.cpp ignores the factor of type none."""
        self._require("rope.scaling.attn_factor", (1.0,))
        return self._match_table() if FACTORS in self.header.tensors else None

    def _linear(self) -> dict | None:
        self._require("rope.scaling.attn_factor", (1.0,))
        factor = self._factor()
        if FACTORS not in self.header.tensors:
            return {"rope_type": "linear", "factor": factor} if factor != 1 else None
        if factor != 1:
            self.errors.add("rope.scaling.factor", f"1 beside the table {FACTORS}", factor, HINT)
        return self._match_table()

    def _yarn(self) -> dict:
        scaling = {"rope_type": "yarn", "factor": self._factor(), **self._original_length()}
        if self.has_yarn_scale:
            if f"{self.family}.rope.scaling.yarn_log_multiplier" not in self.header.metadata:
                self.errors.add("rope.scaling.yarn_log_multiplier", "1", "none", f"llama.cpp's versions differ. {HINT}")
            for key in ("attn_factor", "yarn_attn_factor"):
                self._require(f"rope.scaling.{key}", (1.0,))
            return {**scaling, "mscale": 1.0, "mscale_all_dim": 1.0}
        relative = self._number("rope.scaling.attn_factor", 1.0)
        if not self.errors.problems:
            # llama.cpp multiplies the rule's factor by the stated one.
            attention_factor = yarn_scale(scaling["factor"]) * relative
            self._require("rope.scaling.yarn_attn_factor", (attention_factor,))
            if relative != 1:
                scaling["attention_factor"] = attention_factor
        return scaling

    def _longrope(self) -> dict | None:
        if self._factor() != 1:
            self.errors.add("rope.scaling.factor", "1 with longrope", self._factor(), HINT)
        short, long = self._read_table(SHORT_FACTORS), self._read_table(LONG_FACTORS)
        if short is None or long is None:
            return None
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long, **self._original_length()}
        return {**scaling, "factor": 1.0, "attention_factor": self._number("rope.scaling.attn_factor", 1.0)}

    def _original_length(self) -> dict[str, object]:
        """Returns the original length under Hugging Face's key; {} if it is the context length."""
        length = self._number("rope.scaling.original_context_length", 0.0)
        return {ORIGINAL_LENGTH: int(length)} if length >= 2 else {}

    def _factor(self) -> float:
        """Returns the factor under its current or its old key; 1 if it is 0 or missing."""
        name = "rope.scaling.factor"
        key = name if f"{self.family}.{name}" in self.header.metadata else "rope.scale_linear"
        return self._number(key, 0.0) or 1.0

    def _number(self, key: str, default: float) -> float:
        value = self.header.metadata.get(f"{self.family}.{key}", default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            self.errors.add(key, "a number, 0 or more", repr(value)[:60])
            return default
        return shortest_decimal(value)

    def _require(self, key: str, neutral: tuple[float, ...]) -> None:
        """Adds an error if a key is stated with any value but the neutral ones."""
        value = self.header.metadata.get(f"{self.family}.{key}")
        if value is None:
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not any(math.isclose(value, number, rel_tol=CLOSE) for number in neutral):
            expected = " or ".join(f"{number:g}" for number in neutral)
            self.errors.add(key, f"none, or {expected}", repr(value)[:60], f"llama.cpp's versions differ. {HINT}")

    def _read_table(self, name: str) -> list[float] | None:
        """Returns a table of one divisor for each rotary pair; None, with an error, if there is no such table."""
        block, count = self.header.tensors.get(name), self.num_rotated // 2
        if block is None:
            self.errors.add(name, f"fp32 of shape ({count},)", "none", HINT)
            return None
        if block.shape != (count,) or block.nbytes != 4 * count or block.type.name != "F32":
            self.errors.add(name, f"fp32 of shape ({count},)", f"{block.type.name} of shape {block.shape}", HINT)
            return None
        factors = np.fromfile(block.path, dtype="<f4", count=count, offset=block.offset)
        if len(factors) != count or not np.isfinite(factors).all() or not (factors > 0).all():
            self.errors.add(name, "positive numbers", "others")
            return None
        return [shortest_decimal(factor) for factor in factors]

    def _match_table(self) -> dict | None:
        """Returns Llama 3's rule if it gives the table, else the table itself as the divisors of longrope."""
        factors = self._read_table(FACTORS)
        if factors is None or max(factors) == min(factors) == 1:
            return None
        # Files written by dividing frequencies are off by an ulp.
        factor = round(max(factors), 3) or max(factors)
        for context in (*self._original_length().values(), *CONTEXTS):
            expected = [
                _llama3_factor(self.base ** (-2 * i / self.num_rotated), factor, context) for i in range(len(factors))
            ]
            if np.allclose(factors, expected, rtol=CLOSE, atol=0):
                constants = {"low_freq_factor": LOW, "high_freq_factor": HIGH, ORIGINAL_LENGTH: context}
                return {"rope_type": "llama3", "factor": factor, **constants}
        table = {"short_factor": factors, "long_factor": factors, "factor": 1.0, "attention_factor": 1.0}
        return {"rope_type": "longrope", **table}


def _llama3_factor(frequency: float, factor: float, context: float) -> float:
    """Returns Llama 3's divisor of a frequency: 1 at short wavelengths, `factor` at long ones, smooth between."""
    waves = context * frequency / (2 * math.pi)
    if waves > HIGH:
        return 1.0
    if waves < LOW:
        return factor
    smooth = (waves - LOW) / (HIGH - LOW)
    return 1 / ((1 - smooth) / factor + smooth)

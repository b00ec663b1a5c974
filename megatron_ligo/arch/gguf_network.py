"""What llama.cpp's files say of a network without a key of their own, family by family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GgufNetwork:
    """What llama.cpp computes for one family whatever a file states, and what a file must state.

    names: {`general.architecture`: `model_type`}; {} = the model types that are names of llama.cpp's.
    constants: {field of `ModelConfig`: its value}.
    required: metadata keys without which llama.cpp's versions compute different things.
    window_period: where a file states no pattern, each layer with such a number has no window (0 = none is known).
    rope_period: each layer with such a number has no rotary positions (0 = all have them).
    window_rope_base: the base of the rotary positions of layers with the window, where a file states none; 0 = that of
        the other layers.
    wide_scale_layers: with so many layers the scores are scaled by hidden_size / num_heads, not by the head size.
    has_yarn_scale: positions scaled by YaRN keep the magnitude of queries and keys.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    window_period: int = 0
    rope_period: int = 0
    window_rope_base: float = 0.0
    wide_scale_layers: int = 0
    has_yarn_scale: bool = False

"""The sizes of one network, in one immutable record that every part of the code shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from sys import float_info

from megatron_ligo.common.errors import ConfigError, ErrorCollector, did_you_mean

# A record that says more is damaged: nobody begins to list them.
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and the few constants that change the numbers. `arch` names the table (arch/NAME.py).

    model_type: the Hugging Face family that the config is written for ("llama", "mistral", ...).
    activation: the feed-forward block's, as Hugging Face calls it.
    rope_scaling: the scaling part of the Hugging Face rope parameters, verbatim, or None.
    rotary_fraction: the part of a head's features, from the first on, that rotary positions turn.
    parallel_residual: attention and feed-forward read the residual stream side by side, and not in turn.
    sliding_window: attention reaches back that many tokens; None = all.
    position_padding: tokens of this id are not counted, and the others' positions begin at it + 1 (RoBERTa);
        None = positions are counted from 0. max_positions is the number of rows of the table of positions.
    vocab_size: what the output head tells apart: tokens, or the labels of an image.
    image_size, patch_size: pixels of a side of the (square) image and of each of its patches; num_channels: colours of
        a pixel; None = the model reads no images. has_distillation: a second token beside the class's (DeiT).
    has_head, has_pooler, has_order_head: optional parts (output head, pooler, next-sentence head) that are there.
    """

    arch: str
    model_type: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool = False
    qkv_bias: bool = False
    rope_base: float | None = None
    rope_scaling: Mapping | None = None
    rotary_fraction: float = 1.0
    parallel_residual: bool = False
    sliding_window: int | None = None
    num_token_types: int = 0
    activation: str = "silu"
    position_padding: int | None = None
    has_head: bool = True
    has_pooler: bool = False
    has_order_head: bool = False
    image_size: int | None = None
    patch_size: int | None = None
    num_channels: int | None = None
    has_distillation: bool = False

    def __post_init__(self) -> None:
        errors = ErrorCollector("the sizes of the model do not go together", ConfigError)
        for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                errors.add(name, "a positive integer", repr(value))
        errors.raise_if_any()
        if self.num_heads % self.num_kv_heads:
            errors.add("num_heads", f"a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads)
        if self.rope_base is not None:
            turned = int(self.head_dim * self.rotary_fraction)
            if not 0 < turned <= self.head_dim or turned % 2:
                found = self.head_dim if self.rotary_fraction == 1 else f"{self.rotary_fraction} of {self.head_dim}"
                errors.add("head_dim", "an even number (rotary positions turn pairs)", found)
        if not self.norm_eps > 0:
            errors.add("norm_eps", "a positive number", self.norm_eps)
        self._check_image(errors)
        errors.raise_if_any()

    def _check_image(self, errors: ErrorCollector) -> None:
        if self.image_size is None:
            return
        if not self.patch_size or not self.num_channels:
            errors.add("patch_size, num_channels", "positive integers", f"{self.patch_size}, {self.num_channels}")
        elif self.patches_per_side < 1:
            errors.add("patch_size", f"at most image_size = {self.image_size}", self.patch_size)
        elif self.max_positions != self.tokens_per_image:
            errors.add("max_positions", f"{self.tokens_per_image}, a row for each token", self.max_positions)

    @property
    def patches_per_side(self) -> int:
        """Of an image; pixels beyond the last whole patch are not seen."""
        return self.image_size // self.patch_size

    @property
    def num_special_tokens(self) -> int:
        """How many tokens come before an image's patches: the class's, and DeiT's second one."""
        return 1 + self.has_distillation

    @property
    def tokens_per_image(self) -> int:
        return tokens_per_image(self.image_size, self.patch_size, self.has_distillation)

    def tokens_per_sample(self, seq_length: int) -> int:
        """How many tokens a sample has: as many as a sequence is long, or an image's."""
        return seq_length if self.image_size is None else self.tokens_per_image

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def first_position(self) -> int:
        """The row of a sequence's first token in the table of positions."""
        return 0 if self.position_padding is None else self.position_padding + 1

    @property
    def max_sequence_length(self) -> int:
        """Tokens that have a position."""
        return self.max_positions - self.first_position

    def to_json(self) -> dict:
        """A plain dict; `ModelConfig.from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping) -> ModelConfig:
        names = {f.name for f in fields(cls)}
        errors = ErrorCollector("these are not the sizes of a model", ConfigError)
        for name in data:
            if name not in names:
                errors.add_message(f"unknown size {name!r}. {did_you_mean(name, names)}")
        for f in fields(cls):
            if f.name not in data and f.default is f.default_factory:
                errors.add_message(f"size {f.name!r} is missing")
            elif f.name in data and not any(_has_json_type(data[f.name], kind) for kind in f.type.split(" | ")):
                errors.add(f.name, f.type, repr(data[f.name])[:60])
        if not errors.problems and data["num_layers"] > MAX_LAYERS:
            errors.add("num_layers", f"at most {MAX_LAYERS}", data["num_layers"])
        errors.raise_if_any()
        return cls(**data)


def _has_json_type(value: object, kind: str) -> bool:
    """Whether a value of JSON is of the kind that a field's annotation names."""
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "float":
        return isinstance(value, int | float) and abs(value) <= float_info.max
    return isinstance(value, {"str": str, "int": int, "bool": bool, "Mapping": Mapping, "None": type(None)}[kind])


def tokens_per_image(image_size: int, patch_size: int, has_distillation: bool) -> int:
    """The special ones and a token for each patch."""
    return 1 + has_distillation + (image_size // patch_size) ** 2


def implied_head_sizes(hidden_size: int, num_heads: int) -> dict[str, int]:
    """What every family takes where nothing else is said."""
    return {"head_dim": hidden_size // num_heads, "num_kv_heads": num_heads, "ffn_size": 4 * hidden_size}

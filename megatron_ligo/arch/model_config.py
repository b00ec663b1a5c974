"""The sizes of one model, as an immutable record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from sys import float_info

from megatron_ligo.arch import rope_scaling
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem, did_you_mean

SIZES = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
# Upper bounds: a corrupt record or a slip of the keyboard must fail before its keys are listed.
LIMITS, MAX_SIZE = {"num_layers": 10_000, "num_experts": 10_000}, 2**31 - 1
# Fields with a flag for each layer.
LAYER_PATTERNS = ("window_layers", "chunk_layers", "rope_layers")


@dataclass(frozen=True)
class LayerKind:
    """What the attention of one layer computes. Layers of different kinds never share weights.

    window: in tokens; None = unlimited. rotates: queries and keys have rotary positions. has_window_positions: those of
    `ModelConfig.window_rope_base`. chunk: tokens of a chunk; None = attention is not cut into chunks.
    """

    window: int | None
    rotates: bool
    has_window_positions: bool
    chunk: int | None = None

    def describe(self) -> str:
        """Returns the kind in a few words, for messages."""
        window = f"a window of {self.window}" if self.window is not None else "full attention"
        reach = window if self.chunk is None else f"chunks of {self.chunk}"
        return f"{reach} {'with' if self.rotates else 'without'} rotary positions"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, and the constants that affect its outputs.

    arch: name of the family's definition (arch/families/NAME.py).
    model_type: Hugging Face `model_type` of the config ("llama", "mistral", ...).
    vocab_size: number of classes of the output head: tokens, or labels of an image.
    max_positions: number of rows of the position table (less position_offset); the context length of rotary positions.
    tied: the output head shares the word embedding's weight.
    rope_scaling: the scaling of rotary positions, with Hugging Face's keys (rope_scaling.py); None = none.
    query_scaling_beta: queries at position p are multiplied by 1 + beta log(1 + floor(p / L)), where L is the original
        length of rope_scaling, or query_scaling_length, if that is stated (Architecture.scales_unrotated_queries).
    rotary_fraction: fraction of a head's features that rotate, counted from the first.
    parallel_residual: attention and feed-forward both read the layer's input.
    num_parallel_norms: those that they read it through then, in a family where both may read one norm: 1 or 2.
    sliding_window: attention window in tokens: each attends to itself and so many less one before it, in a family that
        is not causal also after it; None = unlimited.
    window_layers: for each layer, whether it has the window; None = all.
    window_rope_base: base of the rotary positions of layers with the window, which are then not scaled; None = they
        have the positions of the others.
    attention_chunk: tokens attend to themselves and to those before them in a chunk of so many; None = no chunks.
    chunk_layers: for each layer, whether its attention is in chunks; None = all.
    rope_layers: for each layer, whether its queries and keys rotate; None = all.
    l2_normalises_heads: queries and keys of each head are divided by their root mean square (and eps) after the
        rotation, in layers where they rotate.
    activation: the feed-forward activation, by its Hugging Face name.
    position_padding: the padding token's id if positions skip padding and start at id + 1 (RoBERTa); None = positions
        start at 0.
    position_offset: rows of the position table before the first position, which are not counted in max_positions.
    has_head, has_pooler, has_order_head: whether the output head, pooler and next-sentence head exist.
    image_size, patch_size: pixels per side of the (square) image and of its patches; None = no image input.
    num_channels: colour channels of the image.
    has_distillation: a distillation token follows the class token (DeiT).
    num_registers: learned tokens without positions, between the class token and the patches (DINOv2).
    has_mask_token: a token is stored that stands for masked patches, of which there are none here.
    output_bias, mlp_bias: the output projection of attention, and the feed-forward linears, have biases, in a family
        where they may have none; so may LayerNorms (norm_bias), a masked-LM head's transform and the head itself.
    has_gate: the feed-forward block has a gate, in a family where it may have none.
    embedding_multiplier, residual_multiplier: factors of the word embeddings, and of what each block adds.
    attention_scale: factor of the attention scores; None = a power of a head size.
    attention_scale_dim: the head size whose power -1/2 that factor is, if it is not the model's own head_dim.
    logits_multiplier, logits_divisor: factors of the logits: they are multiplied by one, and divided by the other.
    num_experts, top_k: feed-forward experts of each layer, of which ffn_size is one's width, and those that
        a token is routed to; 0 = a dense block.
    renormalises_routing: the weights of a token's experts are divided by their sum.
    shared_expert_ffn_size: width of the expert that every token passes besides; 0 = none.
    attention_softcap, logits_softcap: bounds c of the scores and the logits, c tanh(x / c); None = unbounded.
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
    output_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    head_transform_bias: bool = False
    head_bias: bool = False
    rope_base: float | None = None
    rope_scaling: Mapping | None = None
    query_scaling_beta: float = 0.0
    query_scaling_length: int | None = None
    rotary_fraction: float = 1.0
    parallel_residual: bool = False
    num_parallel_norms: int = 1
    sliding_window: int | None = None
    window_layers: tuple | None = None
    window_rope_base: float | None = None
    attention_chunk: int | None = None
    chunk_layers: tuple | None = None
    rope_layers: tuple | None = None
    l2_normalises_heads: bool = False
    num_token_types: int = 0
    activation: str = "silu"
    position_padding: int | None = None
    position_offset: int = 0
    has_head: bool = True
    has_pooler: bool = False
    has_order_head: bool = False
    image_size: int | None = None
    patch_size: int | None = None
    num_channels: int | None = None
    has_distillation: bool = False
    num_registers: int = 0
    has_mask_token: bool = False
    has_gate: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_scale: float | None = None
    attention_scale_dim: int | None = None
    logits_multiplier: float = 1.0
    logits_divisor: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    num_experts: int = 0
    top_k: int = 0
    renormalises_routing: bool = False
    shared_expert_ffn_size: int = 0

    def __post_init__(self) -> None:
        errors = ErrorCollector("the sizes of the model do not fit together", ConfigError)
        for name, value in vars(self).items():
            if name in SIZES and (type(value) is not int or value < 1):
                errors.add(name, "a positive integer", repr(value))
            elif type(value) is int and value > LIMITS.get(name, MAX_SIZE):
                errors.add(name, f"at most {LIMITS.get(name, MAX_SIZE)}", value)
            elif type(value) is float and not math.isfinite(value):
                errors.add(name, "a finite number", value)
        errors.raise_if_any()
        self._normalise_layer_kinds(errors)
        if self.num_heads % self.num_kv_heads:
            errors.add("num_heads", f"a multiple of num_kv_heads = {self.num_kv_heads}", self.num_heads)
        if self.rope_base is not None:
            self._check_rotary_positions(errors)
        elif self.rope_scaling:
            errors.add("rope_scaling", "none without rotary positions", dict(self.rope_scaling))
        if not self.norm_eps > 0:
            errors.add("norm_eps", "a positive number", self.norm_eps)
        self._check_image(errors)
        if not 0 <= self.top_k <= self.num_experts or bool(self.num_experts) != bool(self.top_k):
            errors.add("top_k", f"1 to num_experts = {self.num_experts}", self.top_k)
        errors.raise_if_any()

    def _normalise_layer_kinds(self, errors: ErrorCollector) -> None:
        """Gives each pattern of layers one form: a tuple of booleans that are not all true, or None."""
        for name in LAYER_PATTERNS:
            flags = getattr(self, name)
            if flags is None:
                continue
            if len(flags) != self.num_layers or not all(isinstance(flag, bool) for flag in flags):
                errors.add(name, f"true or false for each of {self.num_layers} layers", repr(flags)[:60])
            object.__setattr__(self, name, None if all(flags) else tuple(flags))
        for size, name in (("sliding_window", "window_layers"), ("attention_chunk", "chunk_layers")):
            flags = getattr(self, name)
            if flags is not None and not any(flags):
                object.__setattr__(self, size, None)
            if getattr(self, size) is None:
                object.__setattr__(self, name, None)
        if self.sliding_window is None:
            object.__setattr__(self, "window_rope_base", None)
        elif self.attention_chunk is not None:
            errors.add("sliding_window", f"none beside attention_chunk = {self.attention_chunk}", self.sliding_window)

    def _check_rotary_positions(self, errors: ErrorCollector) -> None:
        if not 0 < self.rotary_fraction <= 1 or not self.num_rotated or self.num_rotated % 2:
            found = self.head_dim if self.rotary_fraction == 1 else f"{self.rotary_fraction} of {self.head_dim}"
            errors.add("head_dim", "an even number (rotary positions rotate pairs)", found)
            return
        scaling = rope_scaling.normalise(self.rope_scaling, self.max_positions, self.num_rotated // 2, errors)
        object.__setattr__(self, "rope_scaling", scaling)
        has_length = self.query_scaling_length is not None or rope_scaling.has_original_length(scaling or {})
        if self.query_scaling_beta and not has_length:
            expected = f"a kind with {rope_scaling.ORIGINAL_LENGTH}, which query_scaling_beta needs"
            errors.add("rope_scaling", expected, rope_scaling.scaling_kind(scaling))
        if self.window_rope_base == self.rope_base and scaling is None:
            object.__setattr__(self, "window_rope_base", None)
        if rope_scaling.scaling_kind(scaling) == "yarn" and not self.rope_base > 1:
            errors.add("rope_base", "more than 1 (yarn divides by its logarithm)", self.rope_base)

    def _check_image(self, errors: ErrorCollector) -> None:
        if self.image_size is None:
            return
        if not self.patch_size or not self.num_channels:
            errors.add("patch_size, num_channels", "positive integers", f"{self.patch_size}, {self.num_channels}")
        elif self.patches_per_side < 1:
            errors.add("patch_size", f"at most image_size = {self.image_size}", self.patch_size)
        elif self.max_positions != self.tokens_per_image - self.num_registers:
            expected = f"{self.tokens_per_image - self.num_registers}, a row for each token that is no register"
            errors.add("max_positions", expected, self.max_positions)

    def layer_kind(self, layer: int) -> LayerKind:
        """Returns what a layer's attention computes besides its parameters."""
        has_window = self.sliding_window is not None and (self.window_layers is None or self.window_layers[layer])
        rotates = self.rope_base is not None and (self.rope_layers is None or self.rope_layers[layer])
        chunk = self.attention_chunk if self.chunk_layers is None or self.chunk_layers[layer] else None
        window = self.sliding_window if has_window else None
        return LayerKind(window, rotates, has_window and self.has_window_positions, chunk)

    @property
    def has_window_positions(self) -> bool:
        """True if layers with the window have rotary positions of their own."""
        return self.window_rope_base is not None

    def with_window_positions(self) -> ModelConfig:
        """Returns the config with the rotary positions of layers with the window in every layer."""
        return replace(self, rope_base=self.window_rope_base, rope_scaling=None)

    @property
    def has_two_norms(self) -> bool:
        """True if attention and feed-forward have norms of their own, in a family where they may share one."""
        return self.num_parallel_norms == 2

    @property
    def has_head_bias(self) -> bool:
        return self.has_head and self.head_bias

    @property
    def has_transform_bias(self) -> bool:
        """True if the linear of a masked-LM head's transform has an optional bias."""
        return self.has_head and self.head_transform_bias

    @property
    def has_head_norm_bias(self) -> bool:
        return self.has_head and self.norm_bias

    @property
    def num_rotated(self) -> int:
        """Features of a head that rotate, an even number."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of an image. Pixels beyond the last whole patch are ignored."""
        return self.image_size // self.patch_size

    @property
    def num_special_tokens(self) -> int:
        """Tokens before an image's patches: the class token, and the distillation token or registers."""
        return 1 + self.has_distillation + self.num_registers

    @property
    def tokens_per_image(self) -> int:
        return self.num_special_tokens + self.patches_per_side**2

    def tokens_per_sample(self, seq_length: int) -> int:
        """Returns the number of tokens in a sample (a sequence or an image)."""
        return seq_length if self.image_size is None else self.tokens_per_image

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores, whether stated or following from a head size."""
        if self.attention_scale is not None:
            return self.attention_scale
        return (self.attention_scale_dim or self.head_dim) ** -0.5

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def first_position(self) -> int:
        """Row of a sequence's first token in the position table."""
        return self.position_offset if self.position_padding is None else self.position_padding + 1

    @property
    def num_position_rows(self) -> int:
        """Rows of the position table."""
        return self.max_positions + self.position_offset

    @property
    def max_sequence_length(self) -> int:
        """Number of tokens that have a position."""
        return self.num_position_rows - self.first_position

    def to_json(self) -> dict:
        """Returns a plain dict for `ModelConfig.from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping) -> ModelConfig:
        """Builds a config from a `to_json` dict. ConfigError with every unknown, missing or mistyped size."""
        names = {f.name for f in fields(cls)}
        errors = ErrorCollector("these are not the sizes of a model", ConfigError)
        if not isinstance(data, Mapping):
            raise ConfigError(Problem("sizes of a model", "a table", repr(data)[:60]))
        for name in data:
            if name not in names:
                errors.add_message(f"unknown size {name!r}. {did_you_mean(name, names)}")
        for f in fields(cls):
            if f.name not in data and f.default is f.default_factory:
                errors.add_message(f"size {f.name!r} is missing")
            elif f.name in data and not any(_has_json_type(data[f.name], kind) for kind in f.type.split(" | ")):
                errors.add(f.name, f.type, repr(data[f.name])[:60])
        errors.raise_if_any()
        return cls(**data)


_JSON_TYPES = {"str": str, "int": int, "bool": bool, "tuple": (list, tuple), "Mapping": Mapping, "None": type(None)}


def _has_json_type(value: object, kind: str) -> bool:
    """True if a JSON value has the type of a field's annotation. kind: one type of the annotation."""
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "float":
        return isinstance(value, int | float) and abs(value) <= float_info.max
    return isinstance(value, _JSON_TYPES[kind])


def positions_per_image(image_size: int, patch_size: int, has_distillation: bool) -> int:
    """Returns an image's number of tokens that have a position: special ones but registers, and patches."""
    return 1 + has_distillation + (image_size // patch_size) ** 2


def implied_head_sizes(hidden_size: int, num_heads: int) -> dict[str, int]:
    """Returns the default sizes for a config that states no others."""
    return {"head_dim": hidden_size // num_heads, "num_kv_heads": num_heads, "ffn_size": 4 * hidden_size}

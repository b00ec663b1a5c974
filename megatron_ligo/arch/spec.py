"""The vocabulary in which an architecture is written down: spaces, axes, slots, rows.

A row is one UNFUSED parameter of the network in its canonical form: unfused, unpadded, global (not
sharded), stored as (out features, in features), rotary pairs in the half-split order of Hugging Face
(feature i turns with i + head_dim / 2). Growth, sharding, conversion and hand-off all read rows;
nothing else in the code names a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import MappingProxyType

from megatron_ligo.arch.model_config import ModelConfig, implied_head_sizes
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem


class Use(Enum):
    """Which side of a space's map an axis meets (paper equation 6: B on the out side, A on the in side)."""

    OUTPUT = "writes"  # grows by expand (large x small)
    INPUT = "reads"  # grows by contract (small x large)
    GAIN = "scales"  # a norm's gain: multiplies the features of the space one by one
    BIAS = "shifts"  # a norm's bias: added to them one by one; grows as what it is added to does


class Heads(Enum):
    """How an axis is tiled into heads: not at all, by query heads, or by key/value heads."""

    NONE = "none"
    Q = "q"
    KV = "kv"


class Pack(Enum):
    """How several rows share one stored tensor."""

    NONE = "none"
    GROUPED = "grouped"  # Megatron-core qkv: for each KV group [its query heads; its key; its value]
    STACKED = "stacked"  # one after the other along dim 0: [gate; up], [query; key; value]


class Stage(Enum):
    """Which part of the network holds a parameter. A pipeline's first stage holds FIRST, its last stage LAST."""

    FIRST = "first"  # embeddings, and all else that runs before the layers
    LAYER = "layer"
    LAST = "last"  # the final norm, the heads and the pooler


class Role(Enum):
    """What a parameter does in the network. A linear's or norm's weight and bias share one role."""

    WORD_EMBEDDING = "word embedding"
    POSITION_EMBEDDING = "position embedding"
    TOKEN_TYPE_EMBEDDING = "token-type embedding"
    PATCH_EMBEDDING = "patch embedding"
    CLASS_TOKEN = "class token"
    DISTILLATION_TOKEN = "distillation token"
    EMBEDDING_NORM = "embedding norm"
    ATTENTION_NORM = "attention norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention output"
    FFN_NORM = "ffn norm"
    FFN_GATE = "ffn gate"
    FFN_UP = "ffn up"
    FFN_DOWN = "ffn down"
    FINAL_NORM = "final norm"
    HEAD_TRANSFORM = "head transform"
    HEAD_NORM = "head norm"
    HEAD = "head"
    POOLER = "pooler"
    ORDER_HEAD = "order head"

    @property
    def stage(self) -> Stage:
        if self in _FIRST_STAGE_ROLES:
            return Stage.FIRST
        return Stage.LAST if self in _LAST_STAGE_ROLES else Stage.LAYER


_FIRST_STAGE_ROLES = frozenset(
    {
        Role.WORD_EMBEDDING,
        Role.POSITION_EMBEDDING,
        Role.TOKEN_TYPE_EMBEDDING,
        Role.PATCH_EMBEDDING,
        Role.CLASS_TOKEN,
        Role.DISTILLATION_TOKEN,
        Role.EMBEDDING_NORM,
    }
)
_LAST_STAGE_ROLES = frozenset(
    {Role.FINAL_NORM, Role.HEAD_TRANSFORM, Role.HEAD_NORM, Role.HEAD, Role.POOLER, Role.ORDER_HEAD}
)


class TpUse(Enum):
    """How each tensor-parallel rank uses a parameter, and hence how the gradients of whole copies are reduced."""

    COMPLETE = "complete"  # every rank computes the whole of what the parameter gives: gradients agree
    PARTIAL = "partial"  # each rank computes a part: a gradient of a whole copy is the sum over the ranks


class Task(Enum):
    """What a family is trained to tell, and from what: its samples, its loss and the ends of its network follow."""

    NEXT_TOKEN = "next token"
    MASKED_TOKENS = "masked tokens"
    LABEL = "label"  # one of an image's; the head's vocabulary are the labels


@dataclass(frozen=True)
class Axis:
    space: str
    use: Use
    heads: Heads = Heads.NONE


@dataclass(frozen=True)
class FormatLocation:
    """Where a row lives in one format. `name` has one `{}` for the layer number, if the row is a layer's.

    transposed: stored as (in, out). interleaved: rotary pairs stored as (2i, 2i+1) (Meta, GGUF).
    tied_name: its name where `dims.tied` ("" = the same). unit_dims: stored with so many dims of size 1 before its own.
    """

    name: str
    pack: Pack = Pack.NONE
    part: int = 0
    of: int = 1
    transposed: bool = False
    interleaved: bool = False
    tied_name: str = ""
    unit_dims: int = 0


@dataclass(frozen=True)
class ParamSpec:
    """One parameter. `split` is the dim that tensor parallelism cuts, or None where every rank holds it all.

    needs: name of the field of `ModelConfig` that must be true (or not 0) for the row to exist ("" = always).
    tied_to: key of the row whose tensor this one shares when `dims.tied` (it is then stored nowhere).
    feeds_head: a norm's gain or bias whose norm the output head reads. spare: stored by others, and read by nobody.
    whole_but_partial: every tensor-parallel rank holds the whole tensor and uses a part of it (a norm of each head).
    """

    key: str
    role: Role
    axes: tuple[Axis, ...]
    split: int | None
    slots: Mapping[str, FormatLocation] = field(default_factory=dict)
    needs: str = ""
    tied_to: str = ""
    feeds_head: bool = False
    spare: bool = False
    is_bias: bool = False
    whole_but_partial: bool = False

    @property
    def stage(self) -> Stage:
        return self.role.stage

    @property
    def in_layer(self) -> bool:
        return self.stage is Stage.LAYER

    @property
    def tp_use(self) -> TpUse:
        return TpUse.COMPLETE if self.split is None and not self.whole_but_partial else TpUse.PARTIAL

    @property
    def reaches_loss(self) -> bool:
        """Whether the training loss reads the parameter."""
        return self.needs not in UNTRAINED_PARTS and not self.spare

    def exists(self, model_config: ModelConfig) -> bool:
        return not self.needs or bool(getattr(model_config, self.needs))

    def stored(self, model_config: ModelConfig) -> bool:
        """True where a checkpoint of these dims holds a tensor for the row."""
        return self.exists(model_config) and not (self.tied_to and model_config.tied)

    def shape(self, model_config: ModelConfig) -> tuple[int, ...]:
        """Canonical (global, unpadded) shape."""
        return tuple(axis_size(axis, model_config) for axis in self.axes)


_SPACE_FIELDS = {
    "vocab": "vocab_size",
    "position": "max_positions",
    "channel": "num_channels",
    "pixel": "patch_size",
    "token_type": "num_token_types",
    "residual": "hidden_size",
    "ffn": "ffn_size",
    "head": "hidden_size",
    "pooled": "hidden_size",
}
# Optional parts that the loss does not read, and the space that only they have.
UNTRAINED_PARTS = ("has_pooler", "has_order_head")
UNTRAINED_SPACE = "pooled"
_FIXED_SIZES = {"order": 2}  # the second sentence follows the first, or it does not


def axis_size(axis: Axis, model_config: ModelConfig) -> int:
    """Number of features along an axis."""
    if axis.heads is Heads.Q:
        return model_config.num_heads * model_config.head_dim
    if axis.heads is Heads.KV:
        return model_config.num_kv_heads * model_config.head_dim
    fixed = _FIXED_SIZES.get(axis.space)
    return getattr(model_config, _SPACE_FIELDS[axis.space]) if fixed is None else fixed


@dataclass(frozen=True)
class Architecture:
    """One family of networks: its rows, and what its files are called in each format.

    norm: "rms" or "layer". norm_first: norms stand before the blocks, or else after each sum (post-LN).
    head_activation: that of a masked-LM head's transform, where it is not the layers'.

    hf and gguf: `{config key: Dims field}` of those formats' headers; fixed_hf: values that a Hugging Face config must
    have (or lack) for the table to describe the network; choices: what a field may be; model_types: Hugging Face
    `model_type` -> the classes that may stand in `architectures`, with the optional parts (fields of Dims) that each
    has, the first where a config names none; refused: classes that the table does not describe, and why; implied: what
    a `model_type` settles about the sizes, whatever its config says.

    By format: ignored: patterns (fnmatch) of stored names that are no weights; base: a prefix of names that is left out
    where the last class of `model_types` is stored; renamed: endings of names in old files, and today's.
    """

    name: str
    rows: tuple[ParamSpec, ...]
    norm: str
    model_types: Mapping[str, Mapping[str, tuple[str, ...]]]
    hf: Mapping[str, str]
    norm_first: bool = True
    task: Task = Task.NEXT_TOKEN
    head_activation: str = ""
    fixed_hf: Mapping[str, object] = field(default_factory=dict)
    gguf: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @cached_property
    def by_key(self) -> Mapping[str, ParamSpec]:
        return MappingProxyType({row.key: row for row in self.rows})

    def find(self, role: Role, bias: bool = False) -> ParamSpec | None:
        """Returns the weight (or the bias) that has a role, or None where the family has none.

        A tensor that is stored but never read is not found.
        """
        return self._by_role.get((role, bias))

    def has(self, role: Role, bias: bool = False) -> bool:
        """Tells whether the family has a weight (or a bias) of a role. A network may leave out optional parts."""
        return (role, bias) in self._by_role

    def get(self, role: Role, bias: bool = False) -> ParamSpec:
        """Returns the weight (or the bias) that has a role. KeyError where the family has none."""
        return self._by_role[role, bias]

    @cached_property
    def _by_role(self) -> Mapping[tuple[Role, bool], ParamSpec]:
        return MappingProxyType({(row.role, row.is_bias): row for row in self.rows if not row.spare})

    @property
    def is_causal(self) -> bool:
        """A token attends to itself and to the tokens before it only."""
        return self.task is Task.NEXT_TOKEN

    @property
    def is_masked_lm(self) -> bool:
        return self.task is Task.MASKED_TOKENS

    @property
    def reads_images(self) -> bool:
        """Samples are images, and the head's vocabulary are their labels."""
        return self.task is Task.LABEL

    @property
    def has_learned_positions(self) -> bool:
        """Positions are a table of parameters; otherwise they rotate queries and keys."""
        return self.has(Role.POSITION_EMBEDDING)

    @property
    def is_gated(self) -> bool:
        """The feed-forward block has a gate (SwiGLU)."""
        return self.has(Role.FFN_GATE)

    @property
    def has_linear_biases(self) -> bool:
        """The output projections of attention and feed-forward have biases."""
        return self.has(Role.ATTENTION_OUTPUT, bias=True)

    @property
    def uses_rms_norm(self) -> bool:
        return self.norm == "rms"

    @cached_property
    def _joined(self) -> Mapping[str, str]:
        """Spaces that are others where rows are tied: the tensor that two rows share lies between the same spaces."""
        tied = [(row, self.by_key[row.tied_to]) for row in self.rows if row.tied_to]
        pairs = [pair for own, other in tied for pair in zip(own.axes, other.axes, strict=True)]
        return {own.space: other.space for own, other in pairs if own.space != other.space}

    def space(self, axis: Axis, model_config: ModelConfig) -> str:
        """The space of an axis: with tied rows, two of the table's may be one."""
        return self._joined.get(axis.space, axis.space) if model_config.tied else axis.space

    def spaces(self, model_config: ModelConfig) -> set[str]:
        """The spaces of a network of these sizes."""
        return {self.space(axis, model_config) for row in self.rows if row.exists(model_config) for axis in row.axes}

    def outside(self, model_config: ModelConfig) -> tuple[list[ParamSpec], list[ParamSpec]]:
        """The stored rows that the loss reads before the layers, and after them."""
        rows = [row for row in self.rows if row.stored(model_config) and row.reaches_loss]
        return [row for row in rows if row.stage is Stage.FIRST], [row for row in rows if row.stage is Stage.LAST]

    def row(self, key: str) -> ParamSpec:
        """The row of a key such as `layers.3.q` (or of its pattern `layers.{}.q`)."""
        return self.by_key[key_pattern(key)]

    def keys(self, model_config: ModelConfig) -> Iterator[str]:
        """Every stored key in file order: before the layers, layer by layer, after the layers."""
        rows = [row for row in self.rows if row.stored(model_config)]
        inside = [i for i, row in enumerate(rows) if row.in_layer]
        first, last = inside[0], inside[-1]
        yield from (row.key for row in rows[:first])
        for layer in range(model_config.num_layers):
            yield from (row.key.format(layer) for row in rows[first : last + 1])
        yield from (row.key for row in rows[last + 1 :])

    def parts(self, model_type: str) -> set[str]:
        """The fields of `ModelConfig` that say which optional parts a network of this family has."""
        return {part for parts in self.classes(model_type).values() for part in parts}

    def classes(self, model_type: str) -> Mapping[str, tuple[str, ...]]:
        """The classes of a family, with their parts. ConfigError for a family that this table does not describe."""
        if model_type not in self.model_types:
            raise ConfigError(Problem("model_type", f"one of {', '.join(self.model_types)}", repr(model_type)[:60]))
        return self.model_types[model_type]

    def check(self, model_config: ModelConfig, errors: ErrorCollector) -> None:
        """Adds a fault for each size that the family does not leave free: what its config does not state follows."""
        following = implied_head_sizes(model_config.hidden_size, model_config.num_heads)
        for name, value in following.items():
            if name not in self.hf.values() and getattr(model_config, name) != value:
                where = f"{name} ({self.name}, {model_config.hidden_size} features, {model_config.num_heads} heads)"
                errors.add(where, value, getattr(model_config, name), "This family's config cannot state another.")

    def class_of(self, model_config: ModelConfig) -> str:
        """The Hugging Face class for these dims: the first whose parts are all there, or the last."""
        classes = self.classes(model_config.model_type)
        fitting = [name for name, parts in classes.items() if all(getattr(model_config, part) for part in parts)]
        return fitting[0] if fitting else list(classes)[-1]

    def stored_name(self, key: str, model_config: ModelConfig, form: str) -> str:
        """The name of the tensor that holds a key in a format."""
        slot = self.row(key).slots[form]
        name = slot.tied_name if slot.tied_name and model_config.tied else slot.name
        layer = layer_index(key)
        name = name if layer is None else name.format(layer)
        bare = self.class_of(model_config) == list(self.classes(model_config.model_type))[-1]
        return name.removeprefix(self.base.get(form, "")) if bare else name

    def layer_rows(self, model_config: ModelConfig) -> list[ParamSpec]:
        return [row for row in self.rows if row.in_layer and row.exists(model_config)]


def key_pattern(key: str) -> str:
    """`layers.3.q` -> `layers.{}.q`; keys outside the layers are returned unchanged."""
    head, _, rest = key.partition(".")
    number, _, tail = rest.partition(".")
    return f"{head}.{{}}.{tail}" if head == "layers" and number.isdigit() else key


def layer_index(key: str) -> int | None:
    """`layers.3.q` -> 3; None outside the layers."""
    head, _, rest = key.partition(".")
    number = rest.partition(".")[0]
    return int(number) if head == "layers" and number.isdigit() else None

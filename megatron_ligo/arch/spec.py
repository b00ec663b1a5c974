"""Types of the parameter tables: roles, spaces, axes, locations in the formats, parameters.

A `ParamSpec` is one UNFUSED parameter in its canonical form: unpadded, global (not sharded), stored as
(out features, in features), rotary pairs in Hugging Face's half-split order (feature i rotates with i + head_dim / 2).
Growth, sharding, conversion and hand-off read these specs. No other module names a parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from megatron_ligo.arch.model_config import ModelConfig


class Use(Enum):
    """Side of a space's width map that grows an axis (LiGO, equation 6: B for outputs, A for inputs)."""

    OUTPUT = "writes"  # grows by expand, (large, small)
    INPUT = "reads"  # grows by contract, (small, large)
    GAIN = "scales"  # a norm's gain, or a scale: multiplies the features of the space elementwise
    BIAS = "shifts"  # a norm's bias: added to the features, and grown like them


class Heads(Enum):
    """Head layout of an axis: none, query heads, or key/value heads."""

    NONE = "none"
    Q = "q"
    KV = "kv"


class Pack(Enum):
    """How several parameters share one stored tensor."""

    NONE = "none"
    GROUPED = "grouped"  # Megatron-core's qkv: for each KV group [its query heads; its key; its value]
    STACKED = "stacked"  # concatenated along dim 0: [gate; up], [query; key; value]
    JOINED = "joined"  # concatenated along dim 1, for inputs that are: [class token, mean of the patches]


class Stage(Enum):
    """The part of the network that holds a parameter. FIRST lies on a pipeline's first stage, LAST on its last."""

    FIRST = "first"  # embeddings and all other modules before the layers
    LAYER = "layer"
    LAST = "last"  # the final norm, the heads, the pooler


class Role(Enum):
    """Function of a parameter in the network. The weight and the bias of one module share a role."""

    WORD_EMBEDDING = "word embedding"
    POSITION_EMBEDDING = "position embedding"
    TOKEN_TYPE_EMBEDDING = "token-type embedding"
    PATCH_EMBEDDING = "patch embedding"
    CLASS_TOKEN = "class token"
    DISTILLATION_TOKEN = "distillation token"
    REGISTER_TOKENS = "register tokens"
    MASK_TOKEN = "mask token"
    EMBEDDING_NORM = "embedding norm"
    ATTENTION_NORM = "attention norm"
    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_SINK = "attention sink"  # of each query head: a logit of the softmax that no token has
    QUERY_NORM = "query norm"  # of each head, or of all heads together
    KEY_NORM = "key norm"
    ATTENTION_OUTPUT = "attention output"
    ATTENTION_OUTPUT_NORM = "attention output norm"  # before the residual sum
    ATTENTION_OUTPUT_SCALE = "attention output scale"  # learned, of each feature, before the residual sum
    FFN_NORM = "ffn norm"
    FFN_GATE = "ffn gate"
    FFN_UP = "ffn up"
    FFN_DOWN = "ffn down"
    FFN_OUTPUT_NORM = "ffn output norm"  # before the residual sum
    FFN_OUTPUT_SCALE = "ffn output scale"
    ROUTER = "expert router"  # scores the experts of a layer for each token
    EXPERT_GATE = "expert gate"
    EXPERT_UP = "expert up"
    EXPERT_DOWN = "expert down"
    SHARED_EXPERT_GATE = "shared expert gate"
    SHARED_EXPERT_UP = "shared expert up"
    SHARED_EXPERT_DOWN = "shared expert down"
    SHARED_EXPERT_WEIGHT = "shared expert weight"  # its sigmoid multiplies what the shared expert returns
    FINAL_NORM = "final norm"
    HEAD_TRANSFORM = "head transform"
    HEAD_NORM = "head norm"
    HEAD = "head"
    PATCH_HEAD = "patch head"  # reads the mean of an image's patches, beside the head
    POOLER = "pooler"
    ORDER_HEAD = "order head"

    @property
    def stage(self) -> Stage:
        if self in _FIRST_STAGE_ROLES:
            return Stage.FIRST
        return Stage.LAST if self in _LAST_STAGE_ROLES else Stage.LAYER


_FIRST_STAGE_ROLES = (
    Role.WORD_EMBEDDING,
    Role.POSITION_EMBEDDING,
    Role.TOKEN_TYPE_EMBEDDING,
    Role.PATCH_EMBEDDING,
    Role.CLASS_TOKEN,
    Role.DISTILLATION_TOKEN,
    Role.REGISTER_TOKENS,
    Role.MASK_TOKEN,
    Role.EMBEDDING_NORM,
)
_LAST_STAGE_ROLES = (
    Role.FINAL_NORM,
    Role.HEAD_TRANSFORM,
    Role.HEAD_NORM,
    Role.HEAD,
    Role.PATCH_HEAD,
    Role.POOLER,
    Role.ORDER_HEAD,
)


# A block of experts has these in place of a feed-forward block's.
EXPERT_ROLES = (
    Role.ROUTER,
    Role.EXPERT_GATE,
    Role.EXPERT_UP,
    Role.EXPERT_DOWN,
    Role.SHARED_EXPERT_GATE,
    Role.SHARED_EXPERT_UP,
    Role.SHARED_EXPERT_DOWN,
    Role.SHARED_EXPERT_WEIGHT,
)
OUTPUT_NORMS = (Role.ATTENTION_OUTPUT_NORM, Role.FFN_OUTPUT_NORM)
OUTPUT_SCALES = (Role.ATTENTION_OUTPUT_SCALE, Role.FFN_OUTPUT_SCALE)


class TpUse(Enum):
    """Share of a parameter's computation on each tensor-parallel rank. It determines the gradient's reduction."""

    COMPLETE = "complete"  # every rank does all of it, so the ranks' gradients are equal
    PARTIAL = "partial"  # each rank does its share, so a replicated tensor's gradient is the sum over the ranks


@dataclass(frozen=True)
class Axis:
    """One dim of a parameter: its space (features that grow by one map), its use of the space, its head layout."""

    space: str
    use: Use
    heads: Heads = Heads.NONE


@dataclass(frozen=True)
class FormatLocation:
    """Where one format stores a parameter.

    name: the stored tensor's name, with a `{}` for each number in the parameter's key.
    pack, part, num_parts: the packing of a fused tensor, this parameter's index in it, and its number of parts.
    transposed: stored as (in, out).
    interleaved: rotary pairs stored as neighbours (2i, 2i + 1), as Meta and GGUF do.
    tied_name: the name if the model's embeddings are tied ("" = the same).
    unit_dims: number of leading dims of size 1 in the stored tensor.
    """

    name: str
    pack: Pack = Pack.NONE
    part: int = 0
    num_parts: int = 1
    transposed: bool = False
    interleaved: bool = False
    tied_name: str = ""
    unit_dims: int = 0


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of a family.

    key: canonical name, with one `{}` for the layer number if the parameter is in a layer, and a second one for the
        expert's number if each expert has its own.
    tp_dim: the dim that tensor parallelism shards; None = replicated.
    locations: by format.
    requires: the field of `ModelConfig` that must be true (or not 0) for the parameter to exist ("" = always exists).
    excludes: the field that must be false (or 0).
    skips_first_layer: the first layer has none: it computes as with a gain of 1, or a bias of 0, in its place.
    tied_to: the key whose tensor this parameter shares if embeddings are tied. It is then not stored.
    feeds_head: the gain or bias of the norm before the output head.
    is_bias: the bias of the module whose weight has the same role.
    unread: stored by other libraries, but unused in the forward pass.
    partial_tp_use: replicated, but each tensor-parallel rank applies it to its own share only (a per-head norm).
    feeds_output_norm: a norm normalises the output before the residual sum.
    """

    key: str
    role: Role
    axes: tuple[Axis, ...]
    tp_dim: int | None
    locations: Mapping[str, FormatLocation] = field(default_factory=dict)
    requires: str = ""
    excludes: str = ""
    skips_first_layer: bool = False
    tied_to: str = ""
    feeds_head: bool = False
    is_bias: bool = False
    unread: bool = False
    partial_tp_use: bool = False
    feeds_output_norm: bool = False

    @property
    def stage(self) -> Stage:
        return self.role.stage

    @property
    def in_layer(self) -> bool:
        return self.stage is Stage.LAYER

    @property
    def in_expert(self) -> bool:
        """True if each expert of a layer has its own."""
        return self.key.count("{}") == 2

    def copies(self, model_config: ModelConfig) -> int:
        """Returns how many tensors of this shape a model has: one for each layer, or for each expert of each layer."""
        experts = model_config.num_experts if self.in_expert else 1
        return (model_config.num_layers - self.skips_first_layer) * experts if self.in_layer else 1

    @property
    def tp_use(self) -> TpUse:
        """PARTIAL for a sharded tensor; COMPLETE for a replicated one unless `partial_tp_use` is set."""
        return TpUse.PARTIAL if self.tp_dim is not None or self.partial_tp_use else TpUse.COMPLETE

    @property
    def writes_residual(self) -> bool:
        """True if a layer adds the output to the residual stream. If all such are zero, the layer is idle.

        Of a block whose output is normalised, this is the norm's gain.
        """
        if not self.in_layer or self.feeds_output_norm or self.axes[0].space != "residual":
            return False
        return self.axes[0].use is Use.OUTPUT or self.role in OUTPUT_NORMS

    @property
    def reaches_loss(self) -> bool:
        """True if the training loss depends on the parameter."""
        return self.requires not in UNTRAINED_PARTS and not self.unread

    def exists(self, model_config: ModelConfig) -> bool:
        if self.excludes and getattr(model_config, self.excludes):
            return False
        return not self.requires or bool(getattr(model_config, self.requires))

    def is_stored(self, model_config: ModelConfig) -> bool:
        """True if a checkpoint of this model holds a tensor for the parameter."""
        return self.exists(model_config) and not (self.tied_to and model_config.tied)

    def shape(self, model_config: ModelConfig) -> tuple[int, ...]:
        """Canonical (global, unpadded) shape."""
        return tuple(axis_size(axis, model_config) for axis in self.axes)


# Optional parts outside the training loss, and the space that only they use.
UNTRAINED_PARTS = ("has_pooler", "has_order_head")
UNTRAINED_SPACE = "pooled"
_SIZE_FIELD_BY_SPACE = {
    "vocab": "vocab_size",
    "position": "num_position_rows",
    "channel": "num_channels",
    "pixel": "patch_size",
    "token_type": "num_token_types",
    "register": "num_registers",
    "residual": "hidden_size",
    "ffn": "ffn_size",
    "head": "hidden_size",
    "pooled": "hidden_size",
    "head_feature": "head_dim",
    "expert": "num_experts",
    "shared_ffn": "shared_expert_ffn_size",
}
# Classes of BERT's next-sentence head; the weight of a shared expert.
_FIXED_SIZES = {"order": 2, "score": 1}
SINK_SPACE = "sink"  # one entry for each query head, whatever its size


def axis_size(axis: Axis, model_config: ModelConfig) -> int:
    """Returns the number of features along an axis."""
    if axis.space == SINK_SPACE:
        return model_config.num_heads
    if axis.heads is Heads.Q:
        return model_config.num_heads * model_config.head_dim
    if axis.heads is Heads.KV:
        return model_config.num_kv_heads * model_config.head_dim
    if axis.space in _FIXED_SIZES:
        return _FIXED_SIZES[axis.space]
    return getattr(model_config, _SIZE_FIELD_BY_SPACE[axis.space])


# Prefix of every layer parameter's key.
LAYER_PREFIX = "layers.{}."


# The numbers in a key: `layers.3.q`, `layers.3.experts.5.up`.
_INDEXED_KEY = re.compile(r"(layers)\.(\d+)(?:\.(experts)\.(\d+))?(\..+)")


def key_pattern(key: str) -> str:
    """Replaces a key's numbers: `layers.3.q` -> `layers.{}.q`. Keys outside the layers are returned unchanged."""
    match = _INDEXED_KEY.fullmatch(key)
    if match is None:
        return key
    return f"layers.{{}}.experts.{{}}{match[5]}" if match[3] else f"layers.{{}}{match[5]}"


def key_indices(key: str) -> tuple[int, ...]:
    """Returns the numbers in a key: `layers.3.experts.5.up` -> (3, 5), `layers.3.q` -> (3,), `embed` -> ()."""
    match = _INDEXED_KEY.fullmatch(key)
    return () if match is None else tuple(int(number) for number in match.group(2, 4) if number is not None)


def layer_index(key: str) -> int | None:
    """Returns a key's layer number: `layers.3.q` -> 3. None for keys outside the layers."""
    return next(iter(key_indices(key)), None)


def expert_index(key: str) -> int | None:
    """Returns a key's expert number: `layers.3.experts.5.up` -> 5. None for what all experts share."""
    indices = key_indices(key)
    return indices[1] if len(indices) == 2 else None

"""The growth operator: width maps by space and layer, depth maps by parameter, and norm corrections.

It is a table of small named fp32 tensors, computed one at a time from a seed (initial_operator.py) or read one at
a time from a file (operator_file.py). It does not depend on the layout: each rank takes the rows that it needs.

    width.{map}.expand          (large, small)    width.{map}.{layer}.expand if each layer has its own
    width.{map}.contract        (small, large)    only if contract is a separate parameter
    depth.{param}               (large layers, small layers)
    gain.source                 (hidden large,)   int64: the small feature whose gain it copies; -1: the mean
    gain.scale                  (hidden large,)   1: the factor of a learned scale, which normalises nothing
    gain.layers, gain.final     (hidden large,)   the factor of that gain (final: for the norm before the head)
    gain.{map}.source, .factor  (large,)          the same for norms of spaces other than the residual stream
    gain.{param}.source, .factor                  the same for a norm over all heads
    routers.{layer}             (experts, hidden large)   only if the small model has no router: the large one's

Layers are large layers unless stated otherwise. Layer None means outside the layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import (
    LAYER_PREFIX,
    OUTPUT_SCALES,
    UNTRAINED_SPACE,
    Heads,
    ParamSpec,
    Role,
    Use,
    expert_index,
    key_pattern,
    layer_index,
)
from megatron_ligo.common.recent_values import RecentValues
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import OperatorSection, value_for_space
from megatron_ligo.growth import experts, initializers, row_tables
from megatron_ligo.growth.linear_maps import LinearMap, cheapest_form
from megatron_ligo.growth.methods import resolve_settings
from megatron_ligo.growth.width_maps import LiftedMap, MapSpec, SpaceMaps, grow_tensor

# Enough for the maps that the parameters of one layer use in turn.
CACHE_SIZE = 6
# The most bytes of them, and of the tensors that they are computed from.
CACHE_BYTES = 1 << 30
# The first part of the names of routers that the operator holds themselves.
ROUTERS = "routers"


def depth_role(param: ParamSpec) -> str:
    """Returns a parameter's role in its layer, for the depth initialisations."""
    if param.writes_residual:
        return initializers.WRITES
    return initializers.SCALES if param.axes[0].use is Use.GAIN else initializers.INNER


def short_key(param: ParamSpec) -> str:
    """Returns a layer parameter's key without its numbers: `layers.{}.q` -> `q`, `layers.{}.experts.{}.up` ->
    `experts.up`.
    """
    return param.key.removeprefix(LAYER_PREFIX).replace("{}.", "")


def copy_gain(gain: Tensor, source: Tensor, factor: Tensor) -> Tensor:
    """Copies norms' gains, scaled: (..., small) -> (..., large). source: the small features, -1 for the mean gain."""
    copied = torch.where(source < 0, gain.mean(-1, keepdim=True), gain[..., source.clamp(min=0)])
    return copied * factor.to(gain)


@dataclass
class Operator(ABC):
    """Sizes and settings of an operator, and growth by its tensors. Subclasses provide `tensor`."""

    small: ModelConfig
    large: ModelConfig
    settings: OperatorSection

    def __post_init__(self) -> None:
        self.settings = resolve_settings(self.settings, self.large)
        self.arch = architectures.get(self.large.arch)
        self.space_maps = SpaceMaps(self.small, self.large, value_for_space(self.settings.structure, "groups"))
        self.copied_gains = value_for_space(self.settings.gain, "residual") == "copied"
        self.maps: dict[str, MapSpec] = self.space_maps.map_specs(self.arch)
        self.untrained_maps = (UNTRAINED_SPACE, *experts.absent_maps(self.small, self.settings))
        self._cached_forms: RecentValues[LinearMap] = RecentValues(CACHE_SIZE, CACHE_BYTES)

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Returns a tensor, with the name and shape of the module's docstring, on the CPU, in fp32 or int64."""

    # Settings and names.

    def setting(self, key: str, name: str) -> str | float:
        """Returns the value of an [operator] key for a map (for depth_init: for a parameter)."""
        return value_for_space(getattr(self.settings, key), name)

    def has_map_per_layer(self, map_name: str) -> bool:
        """True if each layer has its own map. Spaces that extend outside the layers have one map."""
        return self.setting("share", map_name) == "layer" and not self.maps[map_name].outside_layers

    def has_contract(self, map_name: str) -> bool:
        """True if contract is a separate parameter, not the transpose of expand."""
        return self.maps[map_name].is_read and self.setting("contract", map_name) == "free"

    def rank(self, map_name: str) -> int:
        """Returns the rank of a map's learned update; 0 if every entry is learned."""
        spec = self.maps[map_name]
        rank = self.setting("rank", map_name)
        return rank if rank < min(spec.small, spec.large) else 0

    def starts_as_selection(self, map_name: str, side: str) -> bool:
        """True if a side of a map starts with at most one entry for each large feature."""
        noisy = self.setting("noise", map_name) and (side == "contract" or self.setting("contract", map_name) == "tied")
        return self.setting("width_init", map_name) not in initializers.DENSE_INITS and not noisy

    def width_name(self, map_name: str, side: str, layer: int | None) -> str:
        """Returns the name of the tensor that holds a side of a map for a layer."""
        infix = f"{layer}." if self.has_map_per_layer(map_name) else ""
        return f"width.{map_name}.{infix}{side}"

    def depth_name(self, key: str) -> str | None:
        """Returns the name of the tensor that holds a large key's depth map; None outside the layers."""
        return None if layer_index(key) is None else f"depth.{short_key(self.arch.param(key))}"

    @property
    def draws_routers(self) -> bool:
        """True if the routers are tensors of their own: the small model is dense, as a mixture of one expert."""
        return self.small.num_experts == 1

    def router_name(self, layer: int) -> str:
        return f"{ROUTERS}.{layer}"

    def gain_names(self, param: ParamSpec) -> tuple[str, str]:
        """Returns the names of the source and the factor of a norm's gain."""
        space = self.arch.space(param.axes[0], self.large)
        if space != "residual":
            owner = space if param.axes[0].heads is Heads.NONE else short_key(param)
            return f"gain.{owner}.source", f"gain.{owner}.factor"
        if param.role in OUTPUT_SCALES:
            return "gain.source", "gain.scale"
        return "gain.source", "gain.final" if param.feeds_head else "gain.layers"

    def norm_kind(self, map_name: str) -> str:
        """Returns the kind of norm of a map's space: "rms", "layer", or "" if there is none."""
        lifts = [self.space_maps.lift(param.axes[0]) for param in self.gains()]
        return self.arch.norm if any(lift is not None and lift.map_name == map_name for lift in lifts) else ""

    def gains(self) -> list[ParamSpec]:
        """Returns the gains of the large model's norms."""
        return [param for param in self.arch.params if param.exists(self.large) and param.axes[0].use is Use.GAIN]

    def copies_gain(self, param: ParamSpec) -> bool:
        """True for a norm's gain whose features are copied, each with a factor, instead of grown by a map."""
        return self.copied_gains and param.axes[0].use is Use.GAIN and self.space_maps.lift(param.axes[0]) is not None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor of the operator, by name, in file order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in self.maps.values():
            for layer in range(self.large.num_layers) if self.has_map_per_layer(spec.name) else [None]:
                shapes[self.width_name(spec.name, "expand", layer)] = (spec.large, spec.small)
                if self.has_contract(spec.name):
                    shapes[self.width_name(spec.name, "contract", layer)] = (spec.small, spec.large)
        for param in self.arch.layer_params(self.large):
            shapes[f"depth.{short_key(param)}"] = (self.large.num_layers, self.small.num_layers)
        for layer in range(self.large.num_layers) if self.draws_routers else ():
            shapes[self.router_name(layer)] = (self.large.num_experts, self.large.hidden_size)
        if self.copied_gains:
            shapes |= dict.fromkeys(("gain.source", "gain.layers", "gain.final"), (self.large.hidden_size,))
            for param in filter(self.copies_gain, self.gains()):
                shapes |= dict.fromkeys(self.gain_names(param), param.shape(self.large))
        return shapes

    def count_parameters(self) -> dict[str, int]:
        """Counts the learned entries of each tensor.

        Excludes frozen identity rows, gain constants and maps that the loss does not depend on.
        """
        counts = {}
        for name, shape in self.shapes().items():
            kind, _, rest = name.partition(".")
            map_name = rest.partition(".")[0]
            if kind == "gain" or map_name in self.untrained_maps:
                continue
            counts[name] = shape[0] * shape[1]
            if kind == "width" and self.rank(map_name):
                counts[name] = self.rank(map_name) * sum(shape)
            elif kind == "width" and name.endswith("expand") and self.setting("identity", map_name) == "frozen":
                counts[name] -= shape[1] * shape[1]
        return counts

    # Random numbers.

    def generator(self, name: str) -> torch.Generator:
        """Returns a generator that depends on the operator's seed and the name only."""
        return seeded_generator(self.settings.seed, name)

    def right_factor(self, name: str, rank: int) -> Tensor:
        """Draws V, (rank, small), of a map that is learned as start + U V, where U starts at zero.

        Its entries are N(0, 1 / rank), so that an Adam step on U moves the map as far as one on all entries would.
        """
        drawn = torch.randn(rank, self.maps[name.split(".")[1]].small, generator=self.generator(f"{name}.v"))
        return drawn / rank**0.5

    def draw_expert(self, key: str) -> Tensor:
        """Draws an expert's matrix in its large shape, (out, in), fp32."""
        return experts.draw_expert(self.arch.param(key), self.large, self.generator(f"experts.{key}"))

    def dropped_neurons(self, key: str) -> Tensor:
        """Returns the neurons of a key's expert that start anew, (m,), int64, the same for all of its matrices."""
        generator = self.generator(f"drop.{key.rpartition('.')[0]}")
        return experts.choose_dropped(self.large.ffn_size, self.settings.expert_drop, generator)

    # Growth.

    def matrix(self, layer: int | None) -> Callable[[LiftedMap, Use], Tensor]:
        """Returns a function from a lifted map and a use to the layer's (large, small) matrix."""

        def matrix_for_use(lift: LiftedMap, use: Use) -> Tensor:
            if use is Use.INPUT and self.has_contract(lift.map_name):
                return self.tensor(self.width_name(lift.map_name, "contract", layer)).t()
            return self.tensor(self.width_name(lift.map_name, "expand", layer))

        return matrix_for_use

    def mix_layers(self, key: str, read: Callable[[str], Tensor], layer_offset: int = 0) -> Tensor:
        """Returns sum_i w[j, i] W_small[i + layer_offset] for a large key of layer j, (out small, in small).

        Indices are clamped to the last small layer. In fp32 or wider; layers with weight zero are not read. Outside the
        layers: the small tensor, with new rows for new tokens and positions.
        """
        layer = layer_index(key)
        if layer is None:
            return self.extend_table(key, read(key))
        pattern = key_pattern(key)
        if self.arch.param(key).skips_first_layer:
            read = row_tables.read_or_neutral(self.arch.param(key), self.small, read)
        weights = self.tensor(self.depth_name(key))[layer]
        sources = [int(i) for i in weights.nonzero().flatten()]
        last = self.small.num_layers - 1
        if expert_index(key) is not None:
            weights_of_experts = self.tensor(self.width_name("expert", "expand", layer))[expert_index(key)]
            read = experts.read_mixture(weights_of_experts, read)
        first = read(pattern.format(min(sources[0] + layer_offset, last) if sources else 0, 0))
        wide = torch.promote_types(first.dtype, torch.float32)
        if len(sources) == 1 and not weights.requires_grad and weights[sources[0]] == 1:
            return first.to(wide)
        mixed = torch.zeros_like(first, dtype=wide)
        for i in sources:
            # The weight stays a tensor, as it may need a gradient.
            mixed.addcmul_(read(pattern.format(min(i + layer_offset, last), 0)).to(wide), weights[i].to(wide))
        return mixed

    def extend_table(self, key: str, table: Tensor) -> Tensor:
        """Adds rows for the tokens, labels or positions that only the large model has: (V, ...) -> (V large, ...)."""
        param = self.arch.param(key)
        space, size = param.axes[0].space, param.shape(self.large)[0]
        if space == "position" and self.large.image_size != self.small.image_size:
            return row_tables.interpolate_positions(table, self.small, self.large)
        if space not in ("vocab", "position") or table.shape[0] == size:
            return table
        if space == "vocab":
            return row_tables.extend_vocabulary(table, size, self.settings.vocab_noise, self.generator(f"tokens.{key}"))
        start, first = self.settings.position_init, self.small.first_position
        return row_tables.extend_positions(table, size, first, start, self.generator(f"positions.{key}"))

    def grow(self, key: str, mixed: Tensor, added_rows: Tensor | None = None) -> Tensor:
        """Grows a large key from its depth-mixed small tensor: (out small, in small) -> (out large, in large).

        In the dtype of `mixed`. added_rows: (out large, in small), see `grow_tensor`.
        """
        param, layer = self.arch.param(key), layer_index(key)
        grown = self._grow_linearly(key, mixed, added_rows)
        if param.axes[0].use is Use.GAIN and self.arch.gain_offset:
            # Mixed and grown is the whole gain, offset + w. This form leaves w alone where nothing grows.
            weight = 1.0 if layer is None else self.tensor(self.depth_name(key))[layer].sum().to(mixed)
            grown_ones = self._grow_linearly(key, torch.ones_like(mixed), None)
            grown = grown + self.arch.gain_offset * (weight * grown_ones - 1)
        return grown

    def _grow_linearly(self, key: str, mixed: Tensor, added_rows: Tensor | None) -> Tensor:
        param, layer = self.arch.param(key), layer_index(key)
        if self.copies_gain(param):
            return self.grow_gain(param, mixed)
        if param.role is Role.ROUTER and self.draws_routers:
            return self.tensor(self.router_name(layer)).to(mixed)
        if experts.is_new(param.role, self.small, self.settings):
            return self.draw_expert(key).to(mixed)
        shard = experts.shard_rows(key, self.small, self.large)

        def matrix(lift: LiftedMap, use: Use) -> LinearMap:
            return self._cheapest_form(lift, use, layer, mixed, shard if lift.map_name == "ffn" else None)

        grown = grow_tensor(param, mixed, matrix, self.space_maps, added_rows)
        if param.in_expert and self.settings.expert_drop:
            return experts.drop_neurons(grown, self.draw_expert(key), param, self.dropped_neurons(key))
        if param.role is Role.WORD_EMBEDDING and self.embedding_ratio != 1:
            return grown / self.embedding_ratio
        return grown * self.bias_shares(param).to(grown) if self.divides_bias(param) else grown

    @property
    def embedding_ratio(self) -> float:
        """The large model's factor of word embeddings over the small one's, by which they are divided."""
        return self.arch.embedding_multiplier(self.large) / self.arch.embedding_multiplier(self.small)

    def _cheapest_form(
        self, lift: LiftedMap, use: Use, layer: int | None, like: Tensor, shard: slice | None = None
    ) -> LinearMap:
        """Returns the cheapest form of a layer's map, or of an expert's rows of it, times the shards on its input side.

        Recent forms are cached, as finding them is slow.
        """
        side = "contract" if use is Use.INPUT and self.has_contract(lift.map_name) else "expand"
        key = (self.width_name(lift.map_name, side, layer), like.dtype, like.device, shard and shard.start, use)
        form = self._cached_forms.get(key)
        if form is None:
            matrix = self.matrix(layer)(lift, use).to(like.dtype)
            if shard is not None:
                scale = experts.num_shards(self.small, self.large) if use is Use.INPUT else 1
                matrix = matrix[shard] * scale
            form = cheapest_form(matrix).to(like)
            if not matrix.requires_grad:
                self._cached_forms.put(key, form, form.nbytes)
        return form

    def grow_gain(self, param: ParamSpec, mixed: Tensor) -> Tensor:
        """Grows a norm's gain by copying: (small,) -> (large,), the source feature's gain times a constant.

        Official LiGO instead grows a gain by the expand of its space (operator.gain = "expand").
        """
        source, factor = (self.tensor(name) for name in self.gain_names(param))
        return copy_gain(mixed, source, factor)

    def divides_bias(self, param: ParamSpec) -> bool:
        """True for the bias of the norm before a tied head, which sums the copies of each feature."""
        return param.axes[0].use is Use.BIAS and self.copied_gains and self.gain_names(param)[1] == "gain.final"

    def bias_shares(self, param: ParamSpec) -> Tensor:
        """Returns the factor of each entry of such a bias, (large,): its copy's share of the feature."""
        return self.tensor("gain.final") / self.tensor("gain.layers")

"""The growth operator: width maps by space and layer, depth maps by row, and the norm's corrections.

It is a table of small named fp32 tensors, computed one at a time from a seed (`InitialOperator`) or read one at a time
from a file (growth/operator_file.py). It knows nothing of ranks: a rank takes the rows that it needs.

    width.{map}.expand          (large, small)    width.{map}.{layer}.expand where a layer has its own
    width.{map}.contract        (small, large)    only where contract is a parameter of its own
    depth.{row}                 (large layers, small layers)
    gain.source                 (hidden large,)   int64: the small feature whose gain each large one takes
    gain.layers, gain.final     (hidden large,)   what that gain is multiplied by (final: the head reads the norm)
    gain.{map}.source, .factor  (large,)          the same for norms of other spaces than the residual stream
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import UNTRAINED_SPACE, ParamSpec, Use, key_pattern, layer_index
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import OperatorSection, value_for_space
from megatron_ligo.growth import attention_heads, initializers, position_table, vocabulary
from megatron_ligo.growth.linear_maps import LinearMap, cheapest_form
from megatron_ligo.growth.methods import resolve_settings
from megatron_ligo.growth.width_maps import LiftedMap, MapSpec, SpaceMaps, grow_tensor, left_inverse

CACHE_SIZE = 6  # what one layer's rows meet in turn, so that each is made once


def writes_residual(param: ParamSpec) -> bool:
    """True for rows whose output a layer adds to the residual stream: at zero, the layer changes nothing."""
    return param.in_layer and param.axes[0].space == "residual" and param.axes[0].use is Use.OUTPUT


def depth_role(param: ParamSpec) -> str:
    """What a row is in its layer, as depth initialisations ask for it."""
    if param.axes[0].use is Use.GAIN:
        return initializers.SCALES
    return initializers.WRITES if writes_residual(param) else initializers.INNER


def short_key(param: ParamSpec) -> str:
    """`layers.{}.q` -> `q`."""
    return param.key.removeprefix("layers.{}.")


@dataclass
class Operator(ABC):
    """What growth needs to know; `tensor(name)` gives one of the tensors named above (CPU; fp32 or int64)."""

    small: ModelConfig
    large: ModelConfig
    settings: OperatorSection

    def __post_init__(self) -> None:
        self.settings = resolve_settings(self.settings, self.large)
        self.arch = architectures.get(self.large.arch)
        self.space_maps = SpaceMaps(self.small, self.large, value_for_space(self.settings.structure, "groups"))
        self.copied_gains = value_for_space(self.settings.gain, "residual") == "copied"
        self.maps: dict[str, MapSpec] = self.space_maps.map_specs(self.arch)
        self._forms: dict[tuple[str, torch.dtype], LinearMap] = {}

    def setting(self, key: str, name: str) -> str | float:
        """An [operator] key for one map (or, for depth_init, one row)."""
        return value_for_space(getattr(self.settings, key), name)

    @abstractmethod
    def tensor(self, name: str) -> Tensor: ...

    def has_map_per_layer(self, map_name: str) -> bool:
        """Whether each large layer has a map of its own; of spaces that reach beyond the layers there is one."""
        return self.setting("share", map_name) == "layer" and not self.maps[map_name].outside_layers

    def width_name(self, map_name: str, side: str, layer: int | None) -> str:
        """The tensor that holds a map's side for a layer (None: outside the layers)."""
        own = self.has_map_per_layer(map_name)
        return f"width.{map_name}.{layer}.{side}" if own else f"width.{map_name}.{side}"

    def has_contract(self, map_name: str) -> bool:
        return self.maps[map_name].is_read and self.setting("contract", map_name) == "free"

    def rank(self, map_name: str) -> int:
        """The rank at which a map is learned on top of its start; 0 where it is learned whole."""
        spec = self.maps[map_name]
        rank = self.setting("rank", map_name)
        return rank if rank < min(spec.small, spec.large) else 0

    def starts_as_selection(self, map_name: str, side: str) -> bool:
        """Whether a side of a map starts with at most one entry for each large feature."""
        noisy = self.setting("noise", map_name) and (side == "contract" or self.setting("contract", map_name) == "tied")
        return self.setting("width_init", map_name) not in initializers.DENSE_INITS and not noisy

    def right_factor(self, name: str, rank: int) -> Tensor:
        """V (rank x small) where a map is learned as start + U V and U starts at zero.

        Its entries are N(0, 1 / rank): a step of Adam on U then moves the map as far as one on all its entries would.
        """
        drawn = torch.randn(rank, self.maps[name.split(".")[1]].small, generator=self.generator(f"{name}.v"))
        return drawn / rank**0.5

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the operator, by name, in file order."""
        found: dict[str, tuple[int, ...]] = {}
        for spec in self.maps.values():
            own = self.has_map_per_layer(spec.name)
            for layer in range(self.large.num_layers) if own else [None]:
                found[self.width_name(spec.name, "expand", layer)] = (spec.large, spec.small)
                if self.has_contract(spec.name):
                    found[self.width_name(spec.name, "contract", layer)] = (spec.small, spec.large)
        for param in self.arch.layer_params(self.large):
            found[f"depth.{short_key(param)}"] = (self.large.num_layers, self.small.num_layers)
        if self.copied_gains:
            found |= dict.fromkeys(("gain.source", "gain.layers", "gain.final"), (self.large.hidden_size,))
            for param in self.arch.params:
                if param.exists(self.large) and param.axes[0].use is Use.GAIN:
                    found |= dict.fromkeys(self.gain_names(param), param.shape(self.large))
        return found

    def gain_names(self, param: ParamSpec) -> tuple[str, str]:
        """The tensors that say whose gain a norm's features take, and what it is multiplied by."""
        space = self.arch.space(param.axes[0], self.large)
        if space != "residual":
            return f"gain.{space}.source", f"gain.{space}.factor"
        return "gain.source", "gain.final" if param.feeds_head else "gain.layers"

    def norm_kind(self, map_name: str) -> str:
        """The kind of norm that reads what a map moves: "rms", "layer", or "" where none does."""
        gains = (
            param.axes[0] for param in self.arch.params if param.exists(self.large) and param.axes[0].use is Use.GAIN
        )
        return self.arch.norm if map_name in {self.arch.space(axis, self.large) for axis in gains} else ""

    def count_parameters(self) -> dict[str, int]:
        """Learned numbers by tensor; frozen identity rows, the gains' constants and what the loss does not
        read do not count."""
        counts = {}
        for name, shape in self.shapes().items():
            kind, _, rest = name.partition(".")
            map_name = rest.partition(".")[0]
            if kind == "gain" or map_name == UNTRAINED_SPACE:
                continue
            counts[name] = shape[0] * shape[1]
            if kind == "width" and self.rank(map_name):
                counts[name] = self.rank(map_name) * sum(shape)
            elif kind == "width" and name.endswith("expand") and self.setting("identity", map_name) == "frozen":
                counts[name] -= shape[1] * shape[1]
        return counts

    def matrix(self, layer: int | None) -> Callable[[LiftedMap, Use], Tensor]:
        """The (large x small) matrices that a layer's rows meet."""

        def of(lift: LiftedMap, use: Use) -> Tensor:
            if use is Use.INPUT and self.has_contract(lift.map_name):
                return self.tensor(self.width_name(lift.map_name, "contract", layer)).t()
            return self.tensor(self.width_name(lift.map_name, "expand", layer))

        return of

    def grow(self, key: str, mixed: Tensor, joined: Tensor | None = None) -> Tensor:
        """The grown tensor of a large key from the depth-mixed small one, in the dtype of `mixed` (`joined`:
        `grow_row`'s)."""
        param, layer = self.arch.param(key), layer_index(key)
        if param.axes[0].use is Use.GAIN and self.copied_gains:
            return self.grow_gain(param, mixed)
        grown = grow_tensor(
            param, mixed, lambda lift, use: self._form(lift, use, layer, mixed), self.space_maps, joined
        )
        return grown * self.bias_shares(param).to(grown) if self.divides_bias(param) else grown

    def _form(self, lift: LiftedMap, use: Use, layer: int | None, like: Tensor) -> LinearMap:
        """A matrix that a layer's rows meet, in its cheapest form; the last ones are kept, for looking takes long."""
        side = "contract" if use is Use.INPUT and self.has_contract(lift.map_name) else "expand"
        key = (self.width_name(lift.map_name, side, layer), like.dtype)
        found = self._forms.pop(key, None)
        if found is None:
            matrix = self.matrix(layer)(lift, use).to(like)
            found = cheapest_form(matrix)
            if matrix.requires_grad:
                return found
        self._forms[key] = found
        if len(self._forms) > CACHE_SIZE:
            del self._forms[next(iter(self._forms))]
        return found

    def grow_gain(self, param: ParamSpec, mixed: Tensor) -> Tensor:
        """A norm's gain: that of the copied feature times a constant (official LiGO grows it as what it scales)."""
        source, factor = (self.tensor(name) for name in self.gain_names(param))
        return mixed[source] * factor.to(mixed)

    def divides_bias(self, param: ParamSpec) -> bool:
        """True for the bias of a norm that a tied head reads: its copies come back as one, as the gains do."""
        return param.axes[0].use is Use.BIAS and self.copied_gains and self.gain_names(param)[1] == "gain.final"

    def bias_shares(self, param: ParamSpec) -> Tensor:
        """What is left to each copy of a feature of such a bias."""
        return self.tensor("gain.final") / self.tensor("gain.layers")

    def extend_table(self, key: str, table: Tensor) -> Tensor:
        """A small tensor with rows for the tokens (labels, positions) that only the large model has."""
        param = self.arch.param(key)
        space, size = param.axes[0].space, param.shape(self.large)[0]
        if space == "position" and self.large.image_size != self.small.image_size:
            return position_table.interpolate_positions(table, self.small, self.large)
        if space not in ("vocab", "position") or table.shape[0] == size:
            return table
        if space == "vocab":
            return vocabulary.extend_vocabulary(table, size, self.settings.vocab_noise, self.generator(f"tokens.{key}"))
        start, first = self.settings.position_init, self.small.first_position
        return position_table.extend_positions(table, size, first, start, self.generator(f"positions.{key}"))

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the seed and the name only."""
        return seeded_generator(self.settings.seed, name)

    def depth_name(self, key: str) -> str | None:
        """The tensor that holds a large key's depth map; None outside the layers."""
        return None if layer_index(key) is None else f"depth.{short_key(self.arch.param(key))}"

    def mix_layers(self, key: str, read: Callable[[str], Tensor], layer_offset: int = 0) -> Tensor:
        """sum_i w[j, i] W_small[i + further] for a large key (the last layer in place of those after it), in fp32 or
        wider; layers at weight zero are not read."""
        layer = layer_index(key)
        if layer is None:
            return self.extend_table(key, read(key))
        pattern = key_pattern(key)
        weights = self.tensor(self.depth_name(key))[layer]
        sources = [int(i) for i in weights.nonzero().flatten()]
        last = self.small.num_layers - 1
        first = read(pattern.format(min(sources[0] + layer_offset, last) if sources else 0))
        wide = torch.promote_types(first.dtype, torch.float32)
        if len(sources) == 1 and not weights.requires_grad and weights[sources[0]] == 1:
            return first.to(wide)
        mixed = torch.zeros_like(first, dtype=wide)
        for i in sources:
            # A gradient may be asked for the weights: no plain number.
            mixed.addcmul_(read(pattern.format(min(i + layer_offset, last))).to(wide), weights[i].to(wide))
        return mixed


class InitialOperator(Operator):
    """The operator where a fit starts, from the settings and their seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._recent: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        found = self._recent.pop(name, None)
        if found is None:
            exact = self.exact_tensor(name)
            found = exact.float() if exact.is_floating_point() else exact
        self._recent[name] = found
        if len(self._recent) > CACHE_SIZE:
            del self._recent[next(iter(self._recent))]
        return found

    def exact_tensor(self, name: str) -> Tensor:
        """The tensor in fp64, before it is rounded."""
        kind, rest = name.split(".", 1)
        if kind == "depth":
            param = self.arch.param(f"layers.{{}}.{rest}")
            make = initializers.DEPTH_INITS[self.setting("depth_init", rest)]
            return make(self.small.num_layers, self.large.num_layers, depth_role(param), self.generator(name))
        if kind == "gain":
            return self._gain(rest)
        map_name, side = rest.split(".")[0], rest.rsplit(".", 1)[1]
        expand = self._expand(map_name, name)
        return expand if side == "expand" else self._contract(map_name, name, expand)

    def initial_expand(self, map_name: str, layer: int | None = None) -> Tensor:
        """The fp64 expand of a map that all layers share, or of a layer's own."""
        return self._expand(map_name, self.width_name(map_name, "expand", layer))

    def _expand(self, map_name: str, name: str) -> Tensor:
        spec = self.maps[map_name]
        stem = name.rsplit(".", 1)[0]
        if map_name == "heads":
            # Query heads stay beside the keys and values of their group.
            groups = self._expand("groups", stem.replace("heads", "groups"))
            return initializers.one_hot(attention_heads.query_head_sources(groups, self.small, self.large), spec.small)
        generator = self.generator(f"{stem}.expand")
        make = initializers.WIDTH_INITS[self.setting("width_init", map_name)]
        expand = make(spec.small, spec.large, self.norm_kind(map_name), generator)
        noise = self.setting("noise", map_name)
        if noise and self.setting("contract", map_name) == "tied" and spec.large > spec.small:
            fresh = expand[spec.small :]
            scale = noise * fresh.abs().mean()
            fresh += scale * torch.randn(fresh.shape, generator=generator, dtype=torch.float64)
        return expand

    def _contract(self, map_name: str, name: str, expand: Tensor) -> Tensor:
        """A left inverse of expand; noise goes where expand cannot see it, so that it stays one."""
        contract = left_inverse(expand)
        noise = self.setting("noise", map_name)
        if noise:
            drawn = torch.randn(contract.shape, generator=self.generator(name), dtype=torch.float64)
            hidden = drawn - (drawn @ expand) @ contract
            contract = contract + noise * contract.std() * hidden
        return contract

    def _gain(self, which: str) -> Tensor:
        space, _, kind = which.rpartition(".")
        expand = self.initial_expand(space or "residual")
        largest, source = expand.abs().max(dim=1)
        # A feature that holds nothing has no feature to take the gain from.
        source = torch.where(largest > 0, source, torch.arange(len(source)) % expand.shape[1])
        if kind == "source":
            return source
        gain = torch.full((expand.shape[0],), variance_ratio(expand) ** 0.5, dtype=torch.float64)
        if kind == "final" and self.large.tied and self.large.has_head:
            # A tied head reads with expand^T: each feature must come back once, however often it was copied.
            gain /= (expand * expand).sum(dim=0)[source]
        return gain


def variance_ratio(expand: Tensor) -> float:
    """c D1 / D2 with expand^T expand = c I (its mean where it is no multiple of I): the mean square of the grown
    residual stream over that of the small one."""
    return float((expand * expand).sum() / expand.shape[0])

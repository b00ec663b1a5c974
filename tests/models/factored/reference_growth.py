"""Growth written out in plain torch: the reference for the factored fit. Uses none of growth/'s arithmetic.

W_large = B (sum_i w_i W_i) A^T (LiGO, arXiv 2303.00980, equation 6), with B and A^T written out as full (large x small)
matrices. Of an operator it takes the tensors by name, the settings and the two models' sizes.

Legend: G KV groups, r query heads a group, d head size; 1 small, 2 large.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ligo.arch.spec import Axis, Heads, ParamSpec, Role, Use, expert_index, key_pattern, layer_index
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import value_for_space
from megatron_ligo.growth.operator import Operator

# Spaces that keep their features.
FIXED_SPACES = (
    "vocab", "position", "token_type", "register", "order", "channel", "pixel", "head_feature", "score"
)  # fmt: skip
Values = dict[str, Tensor]  # the operator's tensors, by name


def materialise(operator: Operator, source, values: Values) -> dict[str, Tensor]:
    """Every grown weight by canonical key, differentiable in `values`."""
    return {key: grow(operator, source, values, key) for key in operator.arch.keys(operator.large)}


def grow(operator: Operator, source, values: Values, key: str) -> Tensor:
    """One grown weight, in the large model's shape."""
    spec, layer, expert = operator.arch.param(key), layer_index(key), expert_index(key)
    if spec.role is Role.ROUTER and f"routers.{layer}" in values:
        return values[f"routers.{layer}"]
    if expert is not None:
        return grown_expert(operator, source, values, spec, layer, expert)
    if is_absent(operator, spec) and spec.role in (Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP):
        return drawn_expert(operator, spec, key)
    mixed = mixed_layers(operator, source, values, spec, layer)
    if spec.axes[0].use is Use.GAIN:
        # The whole gain of a norm that multiplies by 1 + w is mixed and grown, and w is stored.
        offset = operator.arch.gain_offset
        shares = torch.ones(()) if layer is None else depth_row(operator, values, spec, layer).sum()
        return grown_gain(operator, values, spec, mixed + offset * shares, layer) - offset
    fresh = fresh_rows(operator, source, spec, layer)
    for dim, axis in enumerate(spec.axes):
        matrix = feature_matrix(operator, values, axis, layer)
        if matrix is not None:
            mixed = torch.tensordot(matrix, mixed, dims=([1], [dim])).movedim(0, dim)
        if dim == 0 and fresh is not None:
            mixed = mixed + fresh
    if spec.role is Role.WORD_EMBEDDING and operator.arch.scales_embedding:
        # transformers multiplies by the square root of the width.
        return mixed * (operator.small.hidden_size / operator.large.hidden_size) ** 0.5
    if spec.feeds_head and operator.large.tied and value_for_space(operator.settings.gain, "residual") == "copied":
        # A norm's bias before a tied head: the copies of a feature come back as one.
        mixed = mixed * values["gain.final"] / values["gain.layers"]
    return mixed + corner_table(operator, spec, layer)


def grown_expert(operator: Operator, source, values: Values, spec: ParamSpec, layer: int, expert: int) -> Tensor:
    """A large expert: a sum of small ones, of whose ffn it takes a shard; `down` counts it once for each shard."""
    small, large = operator.small, operator.large
    key = spec.key.format(layer, expert)
    if is_absent(operator, spec) and spec.role is not Role.EXPERT_DOWN:
        return drawn_expert(operator, spec, key)
    weights = width_map(operator, values, "expert", layer, False)[expert]
    shards = -(-small.ffn_size // large.ffn_size)
    rows = slice(expert % shards * large.ffn_size, (expert % shards + 1) * large.ffn_size)
    mixed = torch.zeros(spec.shape(small))
    for i, depth in enumerate(depth_row(operator, values, spec, layer)):
        for j in range(small.num_experts):
            mixed = mixed + depth * weights[j] * source.read(spec.key.format(i, j))
    for dim, axis in enumerate(spec.axes):
        matrix = feature_matrix(operator, values, axis, layer)
        if axis.space == "ffn":
            matrix = matrix[rows] * (shards if axis.use is Use.INPUT else 1)
        mixed = torch.tensordot(matrix, mixed, dims=([1], [dim])).movedim(0, dim)
    if not operator.settings.expert_drop:
        return mixed
    seed, width = operator.settings.seed, large.ffn_size
    order = torch.randperm(width, generator=seeded_generator(seed, f"drop.layers.{layer}.experts.{expert}"))
    is_anew = torch.zeros(width, dtype=torch.bool)
    is_anew[order[: round(operator.settings.expert_drop * width)]] = True
    drawn = drawn_expert(operator, spec, key)
    return torch.where(is_anew if spec.role is Role.EXPERT_DOWN else is_anew[:, None], drawn, mixed)


def is_absent(operator: Operator, spec: ParamSpec) -> bool:
    """True for the block, routed or shared, that holds nothing of a dense small model."""
    absent = "EXPERT" if operator.settings.expert_start == "shared" else "SHARED_EXPERT"
    return operator.small.num_experts == 1 and spec.role.name.startswith(f"{absent}_")


def drawn_expert(operator: Operator, spec: ParamSpec, key: str) -> Tensor:
    """An expert's random matrix, in the large model's shape."""
    out, fan_in = spec.shape(operator.large)
    deviation = (fan_in * (2 * operator.large.num_layers if spec.writes_residual else 1)) ** -0.5
    return torch.randn(out, fan_in, generator=seeded_generator(operator.settings.seed, f"experts.{key}")) * deviation


def mixed_layers(operator: Operator, source, values: Values, spec: ParamSpec, layer: int | None) -> Tensor:
    """The depth-mixed small weight; outside the layers, the small weight with its new rows."""
    if layer is None:
        return with_new_rows(operator, spec, source.read(spec.key))
    layers = range(operator.small.num_layers)
    if spec.skips_first_layer:
        # ModernBERT's first layer reads the stream as if its norm had these.
        absent = torch.zeros(operator.small.hidden_size) if spec.is_bias else torch.ones(operator.small.hidden_size)
        stack = torch.stack([source.read(spec.key.format(i)) if i else absent for i in layers])
    else:
        stack = torch.stack([source.read(spec.key.format(i)) for i in layers])
    return torch.einsum("l,l...->...", depth_row(operator, values, spec, layer), stack)


def depth_row(operator: Operator, values: Values, spec: ParamSpec, layer: int) -> Tensor:
    """The weight of each small layer in a large one, (small layers,): zero for layers of another kind."""
    small, large = operator.small, operator.large
    alike = [float(small.layer_kind(i) == large.layer_kind(layer)) for i in range(small.num_layers)]
    return values[f"depth.{short_name(spec)}"][layer] * torch.tensor(alike)


def with_new_rows(operator: Operator, spec: ParamSpec, table: Tensor) -> Tensor:
    """Rows for the tokens, labels and positions that only the large model has."""
    small, large, settings = operator.small, operator.large, operator.settings
    count = spec.shape(large)[0] - table.shape[0]
    if spec.role is Role.POSITION_EMBEDDING and small.image_size != large.image_size:
        return interpolated_positions(operator, table)
    if count == 0 or spec.axes[0].space not in ("vocab", "position"):
        return table
    if spec.axes[0].space == "vocab":
        generator = seeded_generator(settings.seed, f"tokens.{spec.key}")
        return torch.cat([table, rows_around_mean(table, count, settings.vocab_noise, generator)])
    used = table[small.first_position :]
    if settings.position_init == "tile":
        return torch.cat([table, used[torch.arange(count) % len(used)]])
    generator = seeded_generator(settings.seed, f"positions.{spec.key}")
    return torch.cat([table, rows_around_mean(used, count, float(settings.position_init == "random"), generator)])


def rows_around_mean(table: Tensor, count: int, noise: float, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, *table.shape[1:], generator=generator, dtype=torch.float64)
    return (table.double().mean(0) + noise * table.double().std(0) * drawn).to(table)


def interpolated_positions(operator: Operator, table: Tensor) -> Tensor:
    """Bicubic over the patches, as transformers' ViT does it; special tokens keep their rows."""
    small, large = operator.small, operator.large
    side, size = small.image_size // small.patch_size, large.image_size // large.patch_size
    special = len(table) - side * side
    patches = table[special:].reshape(side, side, -1).permute(2, 0, 1)[None]
    # Of these classes one interpolates with antialiasing.
    antialias = operator.arch.name == "dinov2_with_registers"
    grid = F.interpolate(patches, size=(size, size), mode="bicubic", align_corners=False, antialias=antialias)[0]
    return torch.cat([table[:special], grid.permute(1, 2, 0).flatten(0, 1)])


def grown_gain(operator: Operator, values: Values, spec: ParamSpec, mixed: Tensor, layer: int | None) -> Tensor:
    """A norm's gain: the copied feature's times a constant, or (official LiGO) grown as a vector."""
    if spec.role in (Role.QUERY_NORM, Role.KEY_NORM):
        if spec.axes[0].space == "head_feature":
            return head_gains(operator.small, operator.large, spec.role is Role.QUERY_NORM, mixed)
        if value_for_space(operator.settings.gain, "residual") != "copied":
            return feature_matrix(operator, values, spec.axes[0], layer) @ mixed
        stem = f"gain.{short_name(spec)}"
        return mixed[values[f"{stem}.source"]] * values[f"{stem}.factor"]
    space = "head" if spec.role is Role.HEAD_NORM and not operator.large.tied else "residual"
    if value_for_space(operator.settings.gain, "residual") != "copied":
        return width_map(operator, values, space, None, False) @ mixed
    if spec.role in (Role.ATTENTION_OUTPUT_SCALE, Role.FFN_OUTPUT_SCALE):
        # It follows no norm.
        return torch.cat([mixed, mixed.mean().reshape(1)])[values["gain.source"]]
    if space == "head":
        return mixed[values["gain.head.source"]] * values["gain.head.factor"]
    with_mean = torch.cat([mixed, mixed.mean().reshape(1)])  # -1: the mean gain
    return with_mean[values["gain.source"]] * values["gain.final" if spec.feeds_head else "gain.layers"]


def width_map(operator: Operator, values: Values, name: str, layer: int | None, is_input: bool) -> Tensor:
    """A width map (large x small) as the fit learns it: contract's transpose where the map has one, else expand."""
    stem = f"width.{name}.{layer}" if f"width.{name}.{layer}.expand" in values else f"width.{name}"
    if is_input and f"{stem}.contract" in values:
        return values[f"{stem}.contract"].t()
    expand = values[f"{stem}.expand"]
    if value_for_space(operator.settings.identity, name) == "frozen":
        size = expand.shape[1]
        expand = torch.cat([torch.eye(size), expand[size:]])
    return expand


def feature_matrix(operator: Operator, values: Values, axis: Axis, layer: int | None) -> Tensor | None:
    """The full (large features x small features) matrix of an axis; None where the space keeps its features."""
    small, large = operator.small, operator.large
    if axis.space in FIXED_SPACES:
        return None
    is_input, is_query = axis.use is Use.INPUT, axis.heads is Heads.Q
    if axis.heads is Heads.NONE:
        return width_map(operator, values, operator.arch.space(axis, large), layer, is_input)
    ratio1, ratio2 = (config.num_heads // config.num_kv_heads for config in (small, large))
    if value_for_space(operator.settings.structure, "groups") == "dense":
        name = axis.space if axis.space != "qk" else "q" if is_query else "k"
        matrix = width_map(operator, values, name, layer, is_input)
        if not is_query or axis.space == "qk":
            return matrix
        # o reads every query head of a group through the group's values.
        groups = matrix.view(large.num_kv_heads, large.head_dim, small.num_kv_heads, small.head_dim)
        lifted = torch.einsum("gdhe,rs->grdhse", groups, torch.eye(ratio2))
        return lifted.reshape(large.num_heads * large.head_dim, -1)
    if is_query and ratio1 != ratio2:
        heads = width_map(operator, values, "heads", layer, is_input)
    else:
        heads = width_map(operator, values, "groups", layer, is_input)
        heads = kronecker(heads, torch.eye(ratio1)) if is_query else heads
    if axis.space == "sink":
        # One number for each query head.
        return heads
    if axis.space == "qk":
        part = "q" if is_query else "k"
    else:
        part = "o" if is_input else "v"
    within = torch.eye(small.head_dim)
    if small.head_dim != large.head_dim:
        within = head_features(part, small.head_dim, large.head_dim, small.rope_base is not None).float()
        if operator.arch.has_head_norms and part in "qk":
            # Their rows keep their mean square; the gains take what the norm would remove.
            within = (within != 0).float()
            within = within / within.sum(dim=0).sqrt() * (large.head_dim / small.head_dim) ** 0.5
    return kronecker(heads, within)


def kronecker(outer: Tensor, inner: Tensor) -> Tensor:
    """(a, b), (c, d) -> (a c, b d)."""
    return torch.einsum("ab,cd->acbd", outer, inner).reshape(len(outer) * len(inner), -1)


def head_gains(small, large, is_query: bool, gains: Tensor) -> Tensor:
    """(d1,) -> (d2,): a copied gain, divided by what its row is multiplied by; for q times what scores lose."""
    d1, d2 = small.head_dim, large.head_dim
    if d1 == d2:
        return gains
    kept, whole = (head_features(part, d1, d2, small.rope_base is not None) != 0 for part in "kq")
    copies = whole.sum(dim=0) if is_query else torch.ones(d1)
    old = kept.any(dim=1)
    scores = torch.where(old, (d2 / d1) ** 0.5, 1.0) if is_query else 1.0
    return (whole.to(gains) @ (gains * copies.sqrt() * (d1 / d2) ** 0.5)) * scores


def head_features(part: str, small: int, large: int, has_rope: bool) -> Tensor:
    """(d2 x d1): old features keep their rotary pairs, new ones of q, v and o copy them, new ones of k are zero."""
    places = list(range(small))
    if has_rope and part in "qk":
        step = large // small if large % small == 0 else 1
        places = [half * large // 2 + pair * step for half in (0, 1) for pair in range(small // 2)]
    kept, copies = torch.zeros(large, small).double(), torch.zeros(large, small).double()
    for feature, place in enumerate(places):
        kept[place, feature] = 1
    for i, place in enumerate(sorted(set(range(large)) - set(places))):
        copies[place, i % small] = 1
    if part == "k":
        return kept
    if part == "q":
        # Scores are divided by the square root of the head size.
        return kept * (large / small) ** 0.5 + copies
    return kept + copies if part == "v" else (kept + copies) / (kept + copies).sum(dim=0)


def fresh_rows(operator: Operator, source, spec: ParamSpec, layer: int | None) -> Tensor | None:
    """Fresh rows (large out, small in) of new heads, neurons and layers, as large as the small model's own."""
    writes_stream = spec.axes[0].space == "residual"
    if operator.settings.fresh == "corner":
        return corner_rows(operator, spec, layer)
    if operator.settings.fresh != "writers" or layer is None or len(spec.axes) != 2 or writes_stream:
        return None
    small, large, settings = operator.small, operator.large, operator.settings
    shape = spec.shape(large)[0], spec.shape(small)[1]
    sources = [j * small.num_layers // large.num_layers for j in range(large.num_layers)]
    name = "groups" if spec.axes[0].heads is not Heads.NONE else spec.axes[0].space
    kept = spec.shape(small if value_for_space(settings.width_init, name) == "pad" else large)[0]
    is_padded = value_for_space(settings.depth_init, short_name(spec)) == "pad"
    if is_padded and layer > 0 and sources[layer] == sources[layer - 1]:
        kept = 0
    reference = source.read(spec.key.format(sources[layer]))
    drawn = torch.empty(shape).normal_(generator=seeded_generator(settings.seed, f"fresh.{spec.key.format(layer)}"))
    drawn = drawn * float(reference.double().square().mean().sqrt())
    return torch.cat([torch.zeros(kept, shape[1]), drawn[kept:]])


def corner_rows(operator: Operator, spec: ParamSpec, layer: int | None) -> Tensor | None:
    """A corner's rows (large out, small in): new heads and neurons, and what o and down write to new features."""
    small, large = operator.small, operator.large
    if layer is None or len(spec.axes) != 2:
        return None
    out, fan_in = spec.shape(large)
    deviation = fan_in**-0.5
    if spec.axes[0].space == "residual":
        deviation /= (2 * large.num_layers) ** 0.5
    generator = seeded_generator(operator.settings.seed, f"fresh.{spec.key.format(layer)}")
    drawn = torch.empty(out, spec.shape(small)[1]).normal_(generator=generator) * deviation
    drawn[: spec.shape(small)[0]] = 0
    return drawn


def corner_table(operator: Operator, spec: ParamSpec, layer: int | None) -> Tensor | float:
    """A corner's new features of the tables before the layers, in the large shape."""
    dims = [dim for dim, axis in enumerate(spec.axes) if axis.space == "residual" and axis.use is Use.OUTPUT]
    if operator.settings.fresh != "corner" or layer is not None or not dims or spec.key.endswith("_bias"):
        return 0.0
    (dim,) = dims
    old, shape = spec.shape(operator.small)[dim], list(spec.shape(operator.large))
    fan_in = 1 if dim else shape[1:]
    shape[dim] -= old
    deviation = (operator.large.hidden_size * torch.tensor(fan_in).prod().item()) ** -0.5
    drawn = torch.empty(shape).normal_(generator=seeded_generator(operator.settings.seed, f"fresh.{spec.key}"))
    before = torch.zeros(*shape[:dim], old, *shape[dim + 1 :])
    return torch.cat([before, drawn * deviation], dim=dim)


def short_name(spec: ParamSpec) -> str:
    """`layers.{}.q` -> `q`."""
    return key_pattern(spec.key).split(".", 2)[2].replace("{}.", "")

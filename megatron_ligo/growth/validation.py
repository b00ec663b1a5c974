"""Validation of sizes and settings before any process starts. Each check reports all its problems in one error."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

from megatron_ligo import arch as architectures
from megatron_ligo.arch.ffn_ratio import ffn_ratio_of, ffn_size_of
from megatron_ligo.arch.model_config import ModelConfig, positions_per_image
from megatron_ligo.arch.rope_scaling import depends_on_context
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem, did_you_mean
from megatron_ligo.config.run_config import LargeSection, OperatorSection, RunConfig, value_for_space
from megatron_ligo.growth import attention_heads, experts, initializers, layer_kinds
from megatron_ligo.growth.initial_operator import InitialOperator, variance_ratio
from megatron_ligo.growth.methods import DEFAULT_KEYS, METHODS, can_be_lossless, resolve_settings
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.growth.width_maps import HEAD_MAPS, WHOLE_HEADS, MapSpec, SpaceMaps

log = logging.getLogger(__name__)

GROWABLE_SIZES = (
    "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "image_size",
    "num_experts", "shared_expert_ffn_size",
)  # fmt: skip
# Starts of the KV groups that define which small groups each large group comes from.
GROUP_INITS = ("lossless", "copy", "clone", "select", "net2net", "mean")
# Starts that give each large expert one small expert's numbers.
COPYING_INITS = ("copy", "lossless", "clone")
CANNOT_GROW = "the small model cannot grow into the large one"
NEVER_SHRINKS = "Growth never shrinks."


def derive_large_config(small: ModelConfig, section: LargeSection, expert_start: str | None = None) -> ModelConfig:
    """Returns the large model's config. Sizes that the section leaves unset, and eps, are the small model's.

    The kinds of its layers are those of a start in which each layer is followed by its copies. expert_start:
    operator.expert_start, where a dense model becomes one with experts.
    """
    sizes = {name: value for name, value in vars(section).items() if value is not None}
    if "num_experts" in sizes:
        small = experts.as_mixture(small, expert_start)
    if small.num_experts == 1:
        # One of the two holds the whole dense block, and the other is a stand-in.
        sizes.setdefault("ffn_size", max(small.ffn_size, small.shared_expert_ffn_size))
        if small.shared_expert_ffn_size:
            sizes.setdefault("shared_expert_ffn_size", max(small.ffn_size, small.shared_expert_ffn_size))
    if "num_kv_heads" not in architectures.get(small.arch).hf_fields.values() and "num_heads" in sizes:
        # The family has no grouped-query attention.
        sizes.setdefault("num_kv_heads", sizes["num_heads"])
    if "image_size" in sizes:
        if small.image_size is None:
            raise ConfigError(Problem("large.image_size", f"none: {small.arch} reads no images", sizes["image_size"]))
        num_positions = positions_per_image(sizes["image_size"], small.patch_size, small.has_distillation)
        sizes.setdefault("max_positions", num_positions)
    ratio = ffn_ratio_of(small) if architectures.get(small.arch).ffn_ratio_key else None
    if ratio and "hidden_size" in sizes:
        sizes.setdefault("ffn_size", ffn_size_of(sizes["hidden_size"], ratio, small.has_gate))
    head_dim = sizes.get("head_dim", small.head_dim)
    attention_heads.check_pair_lists(small, head_dim)
    sizes["rope_base"] = attention_heads.large_rope_base(small, head_dim)
    if small.has_window_positions:
        sizes["window_rope_base"] = attention_heads.large_rope_base(small.with_window_positions(), head_dim)
    return replace(small, **layer_kinds.spread_patterns(small, sizes.get("num_layers", small.num_layers)), **sizes)


def build_initial_operator(small: ModelConfig, section: LargeSection, settings: OperatorSection) -> InitialOperator:
    """Returns the operator at the start of a fit, with the large model's eps corrected for the residual map.

    ConfigError if sizes or settings are incompatible.
    """
    large = derive_large_config(small, section, settings.expert_start)
    small = experts.as_mixture(small, settings.expert_start) if large.num_experts else small
    settings = resolve_settings(settings, large)
    check_sizes(small, large, value_for_space(settings.width_init, "groups") == "mean")
    check_settings(small, large, settings)
    operator = InitialOperator(small, large, settings)
    _check_groups(operator)
    operator.large = large = layer_kinds.follow_depth(operator)
    if operator.copied_gains and "norm_eps" in architectures.get(small.arch).hf_fields.values():
        # Norms divide by sqrt(variance + eps), so eps must grow with the variance.
        expand = operator.initial_expand("residual")
        operator.large = replace(large, norm_eps=small.norm_eps * variance_ratio(expand))
        _report_shared_eps(operator)
    return operator


def _report_shared_eps(operator: InitialOperator) -> None:
    """Says what an eps that changes costs where norms of queries and keys share it."""
    is_kept = math.isclose(operator.large.norm_eps, operator.small.norm_eps, rel_tol=1e-6)
    has_head_norms = operator.arch.normalises_queries(operator.small)
    if METHODS[operator.settings.method].is_lossless and has_head_norms and not is_kept:
        log.info(
            "the norms of queries and keys share one eps with the others, which growth changes with the variance of "
            "the residual stream: logits change by about that change over the mean square of queries and keys, 1e-6 "
            "where it is 1 and eps 1e-6. contract = 'free' keeps it"
        )


def check_sizes(small: ModelConfig, large: ModelConfig, merges_kv_heads: bool = False) -> None:
    """Raises ConfigError with every size that cannot grow. merges_kv_heads: KV heads may become fewer."""
    errors = ErrorCollector(CANNOT_GROW, ConfigError)
    for name in GROWABLE_SIZES:
        before, after = getattr(small, name), getattr(large, name)
        if before is None or after >= before or (name == "num_kv_heads" and merges_kv_heads):
            continue
        if name == "ffn_size" and large.num_experts:
            # Several experts hold one of the small model's.
            continue
        hint = NEVER_SHRINKS
        if name == "num_kv_heads":
            hint += (
                " To merge keys and values, which loses: operator.width_init = {default = 'lossless', groups = 'mean'}."
            )
        errors.add(f"large.{name}", f"at least the small model's {before}", after, hint)
    if merges_kv_heads and small.num_kv_heads % large.num_kv_heads:
        expected = f"a divisor of the small model's {small.num_kv_heads} (operator.width_init: groups = 'mean')"
        errors.add("large.num_kv_heads", expected, large.num_kv_heads)
    attention_heads.check_rotary_angles(small, large, errors)
    _check_head_norms(small, large, errors)
    _check_context(small, large, errors)
    architectures.get(large.arch).check(large, errors)
    errors.raise_if_any()


def _check_head_norms(small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    """Adds an error for sizes at which the statistics of normalised queries and keys would change."""
    arch = architectures.get(large.arch)
    if arch.normalises_all_heads and large.heads_per_group != small.heads_per_group:
        hint = "Queries and keys are normalised over all heads, whose copies keep their shares only at the same ratio."
        where, found = "large.num_heads / large.num_kv_heads", f"{large.num_heads} / {large.num_kv_heads}"
        errors.add(where, f"{small.num_heads} / {small.num_kv_heads}, or the same ratio", found, hint)
    if small.l2_normalises_heads and large.head_dim % small.head_dim:
        hint = "Queries and keys are normalised without gains, which would undo an uneven number of copies."
        errors.add("large.head_dim", f"a multiple of {small.head_dim}", large.head_dim, hint)


def _check_context(small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    before, after = small.max_positions, large.max_positions
    if architectures.get(small.arch).has_learned_positions:
        if after < before:
            errors.add("large.max_positions", f"at least the small model's {before}", after, NEVER_SHRINKS)
    elif after != before and depends_on_context(small.rope_scaling):
        hint = "Its angles depend on the number of positions: leave max_positions out."
        scaling = dict(small.rope_scaling)
        errors.add("large.max_positions", f"{before} with rope_scaling {scaling}", after, hint)


def _check_groups(operator: InitialOperator) -> None:
    """Raises ConfigError if some layer's map leaves a query head of the small model without a copy."""
    if not operator.space_maps.gqa_ratio_changed:
        return
    errors = ErrorCollector(CANNOT_GROW, ConfigError)
    for layer in range(operator.large.num_layers) if operator.has_map_per_layer("groups") else [None]:
        groups = operator.initial_expand("groups", layer)
        if not errors.problems:
            attention_heads.check_query_heads_fit(groups, operator.small, operator.large, errors)
    errors.raise_if_any()


def check_settings(small: ModelConfig, large: ModelConfig, settings: OperatorSection) -> None:
    """Raises ConfigError with every setting that cannot be used for these sizes."""
    arch = architectures.get(large.arch)
    space_maps = SpaceMaps(small, large, value_for_space(settings.structure, "groups"))
    if arch.has_sinks and space_maps.structure != "heads":
        hint = "Each head has a sink of its own, which dense maps cannot place."
        raise ConfigError(Problem("operator.structure", f"'heads' for {arch.name}", repr(space_maps.structure), hint))
    maps = space_maps.map_specs(arch)
    keys = {short_key(param) for param in arch.layer_params(large)}
    settings.check_spaces({*maps, *keys})
    errors = ErrorCollector("[operator] cannot be built", ConfigError)
    for name in maps:
        known = [start for start in initializers.WIDTH_INITS if start != "mean" or name in WHOLE_HEADS]
        if name == "expert":
            known = COPYING_INITS
        _check_init(errors, f"operator.width_init ({name})", value_for_space(settings.width_init, name), known)
    for name in maps:
        rank = value_for_space(settings.rank, name)
        if rank and value_for_space(settings.identity, name) == "frozen":
            hint = "Take one of the two: a low rank changes every row."
            errors.add(f"operator.rank ({name})", "0 with identity = 'frozen'", rank, hint)
    for key in sorted(keys):
        start = value_for_space(settings.depth_init, key)
        _check_init(errors, f"operator.depth_init ({key})", start, initializers.DEPTH_INITS)
    if value_for_space(settings.share, "residual") != "all":
        hint = "The residual stream runs through all layers: set share = {default = 'layer', residual = 'all'}."
        errors.add("operator.share (residual)", "all", value_for_space(settings.share, "residual"), hint)
    if arch.normalises_all_heads and value_for_space(settings.gain, "residual") == "copied":
        for name in sorted({*HEAD_MAPS} & {*maps}):
            if value_for_space(settings.share, name) != "all":
                hint = "The norm over all heads copies the gains of one choice of heads: set share = 'all' for them."
                errors.add(f"operator.share ({name})", "all", value_for_space(settings.share, name), hint)
    _check_frozen_identity(errors, settings, small, large)
    _check_lossless(errors, settings, small, large)
    _check_padding(errors, settings, maps)
    _check_corner(errors, settings, large)
    experts.check_experts(small, large, settings, METHODS[settings.method].is_lossless, errors)
    for name in maps:
        noisy = value_for_space(settings.noise, name) and settings.noise_draw == "weight"
        if noisy and value_for_space(settings.contract, name) == "tied":
            errors.add(
                f"operator.contract ({name})", "free with noise_draw = 'weight'", "tied", "Copies must cancel it."
            )
    if space_maps.gqa_ratio_changed or space_maps.head_dim_changed:
        _check_changed_heads(errors, settings, space_maps)
    errors.raise_if_any()


def _check_frozen_identity(
    errors: ErrorCollector, settings: OperatorSection, small: ModelConfig, large: ModelConfig
) -> None:
    start = value_for_space(settings.width_init, "residual")
    is_ragged = large.hidden_size % small.hidden_size != 0
    scales_copies = architectures.get(large.arch).uses_rms_norm and (
        start in ("lossless", "net2net") or (start == "clone" and is_ragged)
    )
    grows = large.hidden_size > small.hidden_size
    if value_for_space(settings.identity, "residual") == "frozen" and scales_copies and grows:
        hint = "Scaled copies are no identity rows: take width_init = 'copy', or identity = 'learned'."
        errors.add("operator.identity (residual)", f"learned with width_init = {start!r}", "frozen", hint)


def _check_lossless(errors: ErrorCollector, settings: OperatorSection, small: ModelConfig, large: ModelConfig) -> None:
    """Adds an error for a `lossless` depth start that cannot be lossless. Warns of a width that is nearly lossless."""
    arch = architectures.get(large.arch)
    method = METHODS[settings.method]
    if not arch.pre_norm and large.num_layers > small.num_layers:
        refused = {"lossless", "pad"} if method.is_lossless else {"lossless"}
        starts = {value_for_space(settings.depth_init, short_key(param)) for param in arch.layer_params(large)}
        for start in sorted(starts & refused)[:1]:
            hint = "Take depth_init = 'interlace' or 'stack'."
            found = f"{start!r}: with norms after the residual sums (post-LN) no layer is the identity"
            errors.add("operator.depth_init", "a start that promises no lossless depth", found, hint)
    if method.is_lossless and not can_be_lossless(small, large):
        reason = "no start is lossless: only whole copies keep a LayerNorm's mean and variance"
        log.warning("hidden_size %d to %d is no whole multiple: %s", small.hidden_size, large.hidden_size, reason)


def _check_changed_heads(errors: ErrorCollector, settings: OperatorSection, space_maps: SpaceMaps) -> None:
    """Checks the settings that a changed head ratio or head size requires."""
    when = "with another head size" if space_maps.head_dim_changed else "with another ratio of heads to KV heads"
    required = {
        "noise_draw": ("map", "Noise of each weight needs whole copies of the heads' features."),
        "structure": ("heads", "Dense maps know no heads: they would tear rotary pairs and groups apart."),
        "fresh": ("none", "The small model's features are not the first ones then."),
        "borrow": ("none", "The small model's features are not the first ones then."),
    }
    if space_maps.gqa_ratio_changed:
        required["identity"] = ("learned", "The small model's query heads are not the first ones then.")
    for key, (value, hint) in required.items():
        actual = value_for_space(getattr(settings, key), "groups")
        if actual != value:
            errors.add(f"operator.{key}", f"{value!r} {when}", repr(actual), hint)
    if not space_maps.gqa_ratio_changed:
        return
    start = value_for_space(settings.width_init, "groups")
    if start not in GROUP_INITS:
        hint = "The other starts have no rule for which query heads stay with which keys."
        errors.add("operator.width_init (groups)", f"one of {', '.join(GROUP_INITS)} {when}", repr(start), hint)
    if isinstance(settings.width_init, dict) and settings.width_init.get("heads", start) != start:
        actual = settings.width_init["heads"]
        errors.add(
            "operator.width_init.heads", f"{start!r} as for groups", repr(actual), "Query heads follow their groups."
        )
    groups_share, heads_share = (value_for_space(settings.share, name) for name in WHOLE_HEADS)
    if groups_share != heads_share:
        hint = "Query heads follow their groups."
        errors.add("operator.share (heads)", f"{groups_share!r} as for groups", repr(heads_share), hint)


def _check_padding(errors: ErrorCollector, settings: OperatorSection, maps: Mapping[str, MapSpec]) -> None:
    """Checks that padded features get random numbers, as zeros would never learn, and that they start unread."""
    for name, spec in maps.items():
        if value_for_space(settings.width_init, name) != "pad" or spec.large == spec.small:
            continue
        allowed = ("corner", "all") if name == "residual" else ("writers", "corner", "all")
        if settings.fresh not in allowed:
            hint = "Features that are empty and unread never learn."
            errors.add(f"operator.width_init ({name}) = 'pad'", f"fresh = {' or '.join(allowed)}", settings.fresh, hint)
        noise = value_for_space(settings.noise, name)
        if noise:
            hint = "With noise, random features would be read at once."
            errors.add(f"operator.noise ({name})", "0 with width_init = 'pad'", noise, hint)


def _check_corner(errors: ErrorCollector, settings: OperatorSection, large: ModelConfig) -> None:
    """Checks what a corner start and its token codes need."""
    arch = architectures.get(large.arch)
    if settings.fresh == "corner" and not arch.pre_norm:
        found = f"'corner': {large.arch} has its norms after the residual sums (post-LN)"
        hint = "Every norm would rescale the old features by the new ones: take method = 'stack' or 'direct_copy'."
        errors.add("operator.fresh", "none, writers or all for this family", found, hint)
    if settings.codes and (settings.fresh != "corner" or arch.reads_images):
        hint = "Codes are the tokens' new features: take method = 'corner'."
        errors.add("operator.codes", "no value for this method and family", settings.codes, hint)
    if settings.fresh_scale != DEFAULT_KEYS["fresh_scale"] and settings.fresh != "corner":
        hint = "It scales corner's random weights alone: take method = 'corner'."
        errors.add("operator.fresh_scale", "no value for this method", settings.fresh_scale, hint)


def check_factored(settings: OperatorSection, errors: ErrorCollector) -> None:
    """Adds an error for each setting that needs a materialised large matrix, which a fit never builds."""
    hint = "`ligo grow` does it without --operator; a fit needs another start."
    if settings.fresh == "all":
        errors.add(
            "operator.fresh", "none, writers or corner in a fit", "all: readers as large as the large model", hint
        )
    if settings.noise_draw == "weight":
        errors.add("operator.noise_draw", "map in a fit", "weight: a matrix of noise for each large weight", hint)
    if settings.borrow == "next":
        errors.add("operator.borrow", "none in a fit", "next: two mixtures of layers in one matrix", hint)


def _check_init(errors: ErrorCollector, where: str, name: object, known: Iterable[str]) -> None:
    if name not in known:
        errors.add(where, "a named initialisation", repr(name), did_you_mean(str(name), known))


def check_matches_config(operator: Operator, config: RunConfig, errors: ErrorCollector) -> None:
    """Adds an error for each size of [large] and each key of [operator] that differs from the operator's.

    A section without any key states nothing. In a section with keys, those left out have their usual meaning.
    """
    large, settings = config.large, config.operator
    hint = "Leave the section out to apply the operator as it was fitted, or fit another one."
    if config.states("large"):
        stated = derive_large_config(operator.small, large)
        for name in vars(large):
            fitted_size, stated_size = getattr(operator.large, name), getattr(stated, name)
            if fitted_size != stated_size:
                errors.add(f"large.{name}", f"the operator's {fitted_size}", stated_size, hint)
    if config.states("operator"):
        fitted, stated = asdict(operator.settings), asdict(resolve_settings(settings, operator.large))
        for name, value in fitted.items():
            if stated[name] != value:
                errors.add(f"operator.{name}", f"the operator's {value!r}", repr(stated[name]), hint)

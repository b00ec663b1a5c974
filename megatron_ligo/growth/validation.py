"""What can be grown into what: every reason why not, in one error, before any process starts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig, tokens_of_image
from megatron_ligo.arch.rope import angles_depend_on_length
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem, did_you_mean
from megatron_ligo.config.run_config import LargeSection, OperatorSection, value_for_space
from megatron_ligo.growth import attention_heads, initializers
from megatron_ligo.growth.initial_operator import InitialOperator, variance_ratio
from megatron_ligo.growth.methods import METHODS, can_be_lossless, resolve_settings
from megatron_ligo.growth.operator import short_key
from megatron_ligo.growth.width_maps import WHOLE_HEADS, MapSpec, SpaceMaps

log = logging.getLogger(__name__)

GROWABLE_SIZES = (
    "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "image_size",
)  # fmt: skip
# Starts of the KV groups that say for each which small ones it is made of.
GROUP_INITS = ("lossless", "copy", "clone", "select", "net2net", "mean")


def derive_large_config(small: ModelConfig, section: LargeSection) -> ModelConfig:
    """The large model's sizes before the norm's eps is corrected: the small one's where the config names none."""
    named = {name: value for name, value in vars(section).items() if value is not None}
    if "num_kv_heads" not in architectures.get(small.arch).hf_fields.values() and "num_heads" in named:
        # The family knows no groups.
        named.setdefault("num_kv_heads", named["num_heads"])
    if "image_size" in named:
        if small.image_size is None:
            raise ConfigError(Problem("large.image_size", f"none: {small.arch} reads no images", named["image_size"]))
        of_image = tokens_of_image(named["image_size"], small.patch_size, small.has_distillation)
        named.setdefault("max_positions", of_image)
    named["rope_base"] = attention_heads.large_rope_base(small, named.get("head_dim", small.head_dim))
    return replace(small, **named)


def build_initial_operator(small: ModelConfig, section: LargeSection, settings: OperatorSection) -> InitialOperator:
    """The operator where a fit starts, with the large model's eps as the residual map needs it; or all refusals."""
    large = derive_large_config(small, section)
    settings = resolve_settings(settings, large)
    check_sizes(small, large, value_for_space(settings.width_init, "groups") == "mean")
    check_settings(small, large, settings)
    operator = InitialOperator(small, large, settings)
    _check_groups(operator)
    if operator.copied_gains:
        # RMS and LayerNorm divide by sqrt(variance + eps): eps must grow with the variance.
        expand = operator.initial_expand("residual")
        operator.large = replace(large, norm_eps=small.norm_eps * variance_ratio(expand))
    return operator


def check_sizes(small: ModelConfig, large: ModelConfig, merges: bool = False) -> None:
    """merges: KV heads are to become fewer."""
    errors = ErrorCollector("the small model cannot grow into the large one", ConfigError)
    for name in GROWABLE_SIZES:
        before, after = getattr(small, name), getattr(large, name)
        if before is None or after >= before or (name == "num_kv_heads" and merges):
            continue
        hint = "Growth never shrinks."
        if name == "num_kv_heads":
            hint += (
                " To merge keys and values, which loses: operator.width_init = {default = 'lossless', groups = 'mean'}."
            )
        errors.add(f"large.{name}", f"at least the small model's {before}", after, hint)
    if merges and small.num_kv_heads % large.num_kv_heads:
        expected = f"a divisor of the small model's {small.num_kv_heads} (operator.width_init: groups = 'mean')"
        errors.add("large.num_kv_heads", expected, large.num_kv_heads)
    attention_heads.check_rotary_angles(small, large, errors)
    _check_context(small, large, errors)
    architectures.get(large.arch).check(large, errors)
    errors.raise_if_any()


def _check_context(small: ModelConfig, large: ModelConfig, errors: ErrorCollector) -> None:
    before, after = small.max_positions, large.max_positions
    if architectures.get(small.arch).has_learned_positions:
        if after < before:
            errors.add("large.max_positions", f"at least the small model's {before}", after, "Growth never shrinks.")
    elif after != before and angles_depend_on_length(small):
        hint = "Its angles depend on the number of positions: leave max_positions out."
        scaling = dict(small.rope_scaling)
        errors.add("large.max_positions", f"{before} with rope_scaling {scaling}", after, hint)


def _check_groups(operator: InitialOperator) -> None:
    """Every query head of the small model finds a place, with each layer's map."""
    if not operator.space_maps.gqa_ratio_changed:
        return
    errors = ErrorCollector("the small model cannot grow into the large one", ConfigError)
    own = operator.has_map_per_layer("groups")
    for layer in range(operator.large.num_layers) if own else [None]:
        groups = operator.initial_expand("groups", layer)
        if not errors.problems:
            attention_heads.check_query_heads_fit(groups, operator.small, operator.large, errors)
    errors.raise_if_any()


def check_settings(small: ModelConfig, large: ModelConfig, settings: OperatorSection) -> None:
    arch = architectures.get(large.arch)
    space_maps = SpaceMaps(small, large, value_for_space(settings.structure, "groups"))
    maps = space_maps.map_specs(arch)
    params = {short_key(param) for param in arch.layer_params(large)}
    settings.check_spaces({*maps, *params})
    errors = ErrorCollector("[operator] cannot be built", ConfigError)
    for name in maps:
        known = [start for start in initializers.WIDTH_INITS if start != "mean" or name in WHOLE_HEADS]
        _check_name(errors, f"operator.width_init ({name})", value_for_space(settings.width_init, name), known)
    for name in maps:
        if value_for_space(settings.rank, name) and value_for_space(settings.identity, name) == "frozen":
            hint = "Take one of the two: a low rank leaves no row as it was."
            errors.add(
                f"operator.rank ({name})", "0 with identity = 'frozen'", value_for_space(settings.rank, name), hint
            )
    for name in sorted(params):
        _check_name(
            errors,
            f"operator.depth_init ({name})",
            value_for_space(settings.depth_init, name),
            initializers.DEPTH_INITS,
        )
    if value_for_space(settings.share, "residual") != "all":
        hint = "The residual stream runs through all layers: say share = {default = 'layer', residual = 'all'}."
        errors.add("operator.share (residual)", "all", value_for_space(settings.share, "residual"), hint)
    _check_frozen(errors, settings, small, large)
    _check_lossless(errors, settings, small, large)
    _check_room(errors, settings, maps)
    if space_maps.gqa_ratio_changed or space_maps.head_dim_changed:
        _check_heads(errors, settings, space_maps)
    errors.raise_if_any()


def _check_frozen(errors: ErrorCollector, settings: OperatorSection, small: ModelConfig, large: ModelConfig) -> None:
    start = value_for_space(settings.width_init, "residual")
    shared_out = architectures.get(large.arch).norm == "rms"
    ragged = large.hidden_size % small.hidden_size
    scaled = shared_out and (start in ("lossless", "net2net") or (start == "clone" and ragged))
    grows = large.hidden_size > small.hidden_size
    if value_for_space(settings.identity, "residual") == "frozen" and scaled and grows:
        hint = "Scaled copies are no identity rows: take width_init = 'copy', or identity = 'learned'."
        errors.add("operator.identity (residual)", f"learned with width_init = {start!r}", "frozen", hint)


def _check_lossless(errors: ErrorCollector, settings: OperatorSection, small: ModelConfig, large: ModelConfig) -> None:
    """Where a start that is called lossless could not be: refused for depth, told for width (it is near)."""
    arch = architectures.get(large.arch)
    method = METHODS[settings.method]
    if not arch.pre_norm and large.num_layers > small.num_layers:
        promising = ("lossless", "pad") if method.is_lossless else ("lossless",)
        names = sorted(
            {value_for_space(settings.depth_init, short_key(param)) for param in arch.layer_params(large)}
            & set(promising)
        )
        if names:
            hint = "Take depth_init = 'interlace' or 'stack'."
            found = f"{names[0]!r}: with norms after the sums (post-LN) no layer leaves what it is given as it is"
            errors.add("operator.depth_init", "a start that promises no lossless depth", found, hint)
    if method.is_lossless and not can_be_lossless(small, large):
        what = "no start is lossless: a LayerNorm's mean and variance survive whole copies only"
        log.warning("hidden_size %d to %d is no whole multiple: %s", small.hidden_size, large.hidden_size, what)


def _check_heads(errors: ErrorCollector, settings: OperatorSection, space_maps: SpaceMaps) -> None:
    """What another ratio of heads or another head size asks of the settings."""
    what = "with another head size" if space_maps.head_dim_changed else "with another ratio of heads to KV heads"
    wanted = {
        "structure": ("heads", "Dense maps know no heads: angles and groups would be torn apart."),
        "fresh": ("none", "The small model's features are not the first ones then."),
        "borrow": ("none", "The small model's features are not the first ones then."),
    }
    if space_maps.gqa_ratio_changed:
        wanted["identity"] = ("learned", "The small model's query heads are not the first ones then.")
    for key, (value, hint) in wanted.items():
        found = value_for_space(getattr(settings, key), "groups")
        if found != value:
            errors.add(f"operator.{key}", f"{value!r} {what}", repr(found), hint)
    if not space_maps.gqa_ratio_changed:
        return
    start = value_for_space(settings.width_init, "groups")
    if start not in GROUP_INITS:
        hint = "The others have no rule for which query heads stay with which keys."
        errors.add("operator.width_init (groups)", f"one of {', '.join(GROUP_INITS)} {what}", repr(start), hint)
    if isinstance(settings.width_init, dict) and settings.width_init.get("heads", start) != start:
        found = settings.width_init["heads"]
        errors.add("operator.width_init.heads", f"{start!r} as for groups", repr(found), "Query heads follow.")
    one, other = (value_for_space(settings.share, name) for name in WHOLE_HEADS)
    if one != other:
        errors.add("operator.share (heads)", f"{one!r} as for groups", repr(other), "Query heads follow their groups.")


def _check_room(errors: ErrorCollector, settings: OperatorSection, maps: Mapping[str, MapSpec]) -> None:
    """What is padded must be filled, or it would stay at zero for ever; what is filled must not be read yet."""
    for name, spec in maps.items():
        if value_for_space(settings.width_init, name) != "pad" or spec.large == spec.small:
            continue
        needed = ("all",) if name == "residual" else ("writers", "all")
        if settings.fresh not in needed:
            hint = "Features that hold nothing and that nobody reads never learn."
            errors.add(f"operator.width_init ({name}) = 'pad'", f"fresh = {' or '.join(needed)}", settings.fresh, hint)
        if value_for_space(settings.noise, name):
            hint = "Noise would have fresh features read at once."
            errors.add(
                f"operator.noise ({name})", "0 with width_init = 'pad'", value_for_space(settings.noise, name), hint
            )


def check_factored(settings: OperatorSection, errors: ErrorCollector) -> None:
    """Adds a fault for each thing that a checkpoint can be grown with and a fit, which builds no large matrix, not."""
    hint = "tools/grow.py does it without --operator; a fit needs another start."
    if settings.fresh == "all":
        errors.add("operator.fresh", "none or writers in a fit", "all: readers as large as the large model", hint)
    if settings.borrow == "next":
        errors.add("operator.borrow", "none in a fit", "next: two mixtures of layers in one matrix", hint)


def _check_name(errors: ErrorCollector, where: str, name: object, known: Iterable[str]) -> None:
    if name not in known:
        errors.add(where, "a named initialisation", repr(name), did_you_mean(str(name), known))

"""What can be grown into what: every reason why not, in one error, before any process starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_ligo import arch as architectures
from megatron_ligo.arch.dims import Dims
from megatron_ligo.config import LargeSection, OperatorSection, by_space
from megatron_ligo.errors import ConfigError, Faults, nearest
from megatron_ligo.growth import init
from megatron_ligo.growth.maps import map_specs
from megatron_ligo.growth.operator import Initial, short, variance_ratio


def large_dims(small: Dims, section: LargeSection) -> Dims:
    """The large model's sizes before the norm's eps is corrected: the small one's where the config names none."""
    named = {name: value for name, value in vars(section).items() if value is not None}
    return replace(small, **named)


def initial_operator(small: Dims, section: LargeSection, settings: OperatorSection) -> Initial:
    """The operator where a fit starts, with the large model's eps as the residual map needs it; or all refusals."""
    large = large_dims(small, section)
    check_sizes(small, large)
    check_settings(small, large, settings)
    operator = Initial(small, large, settings)
    if operator.copied_gains:
        # RMS and LayerNorm divide by sqrt(variance + eps): eps must grow with the variance.
        expand = operator.initial_expand("residual")
        operator.large = replace(large, norm_eps=small.norm_eps * variance_ratio(expand))
    return operator


def check_sizes(small: Dims, large: Dims) -> None:
    faults = Faults("the small model cannot grow into the large one", ConfigError)
    for name in ("num_layers", "hidden_size", "ffn_size", "num_kv_heads"):
        before, after = getattr(small, name), getattr(large, name)
        if after < before:
            faults.add(f"large.{name}", f"at least the small model's {before}", after, "Growth never shrinks.")
    if small.heads_per_group != large.heads_per_group:
        expected = f"{small.heads_per_group} query heads for each KV head, as in the small model"
        found = f"{large.num_heads} / {large.num_kv_heads}"
        faults.add("large.num_heads / large.num_kv_heads", expected, found, "Keep the ratio.")
    faults.raise_if_any()


def check_settings(small: Dims, large: Dims, settings: OperatorSection) -> None:
    arch = architectures.get(large.arch)
    structure = by_space(settings.structure, "groups")
    maps = map_specs(arch, small, large, structure)
    rows = {short(row) for row in arch.layer_rows(large)}
    settings.check_spaces({*maps, *rows})
    faults = Faults("[operator] cannot be built", ConfigError)
    for name in maps:
        _check_name(faults, f"operator.width_init ({name})", by_space(settings.width_init, name), init.WIDTH)
    frozen = by_space(settings.identity, "residual") == "frozen"
    scaled = by_space(settings.width_init, "residual") == "lossless" and large.hidden_size > small.hidden_size
    if frozen and scaled:
        do = "Scaled copies are no identity rows: take width_init = 'copy', or identity = 'learned'."
        faults.add("operator.identity (residual)", "learned with width_init = 'lossless'", "frozen", do)
    for name in sorted(rows):
        _check_name(faults, f"operator.depth_init ({name})", by_space(settings.depth_init, name), init.DEPTH)
    if by_space(settings.share, "residual") != "all":
        do = "The residual stream runs through all layers: say share = {default = 'layer', residual = 'all'}."
        faults.add("operator.share (residual)", "all", by_space(settings.share, "residual"), do)
    faults.raise_if_any()


def _check_name(faults: Faults, where: str, name: object, known: Mapping) -> None:
    if name not in known:
        faults.add(where, "a named initialisation", repr(name), nearest(str(name), known))

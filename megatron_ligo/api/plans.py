"""`ligo.plan`: what a run needs, before any machine is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from megatron_ligo.api.settings import ConfigSource, LargeSizes, Settings, build_config
from megatron_ligo.planning.run_plan import RunPlan, plan_run


def plan(
    small: str | Path | None = None,
    *,
    world_size: int = 1,
    device_memory: float = 80e9,
    flops_per_second: float = 300e12,
    config: ConfigSource = None,
    settings: Settings | None = None,
    **sizes: Unpack[LargeSizes],
) -> RunPlan:
    """Plans the fit and the pretraining of a growth: `print` it for memory, FLOPs, time, traffic and layouts.

    small: a checkpoint or a config.json; None: that of `config`. world_size: devices, each of `device_memory` bytes
    and `flops_per_second` in the run's precision. config, settings: a run.toml and more of its keys. sizes: as
    `grow` takes them.
    Raises LigoError for sizes that cannot be grown.
    """
    path = {} if small is None else {"small.path": f"{small}"}
    return plan_run(build_config(config, sizes, settings, path), world_size, device_memory, flops_per_second)

"""`ligo.plan`: what a run needs, before any machine is rented."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from megatron_ligo.api.settings import ConfigSource, LargeSizes, Settings, build_config, check_number
from megatron_ligo.api.sources import ModelSource, open_model
from megatron_ligo.common.errors import machine_errors
from megatron_ligo.planning.run_plan import RunPlan, plan_run


@machine_errors()
def plan(
    small: ModelSource | None = None,
    *,
    world_size: int = 1,
    device_memory: float = 80e9,
    flops_per_second: float = 300e12,
    config: ConfigSource = None,
    settings: Settings | None = None,
    **sizes: Unpack[LargeSizes],
) -> RunPlan:
    """Plans the fit and the pretraining of a growth: `print` it for memory, FLOPs, time, traffic and layouts.

    small: a checkpoint, a config.json or a model in memory; None: that of `config`. world_size: devices, each of
    `device_memory` bytes and `flops_per_second` in the run's precision. config, settings: a run.toml and more of its
    keys. sizes: as `grow` takes them.
    Raises LigoError for sizes that cannot be grown.
    """
    check_number("world_size", world_size, 1)
    check_number("device_memory", device_memory, 1, int | float)
    check_number("flops_per_second", flops_per_second, 1, int | float)
    is_path = isinstance(small, str | Path)
    run_config = build_config(config, sizes, settings, {"small.path": f"{small}"} if is_path else {})
    model_config = None if small is None or is_path else open_model(small).model_config
    return plan_run(run_config, world_size, device_memory, flops_per_second, model_config)

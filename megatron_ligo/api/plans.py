"""`ligo.plan`: what a run needs, before any machine is rented."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.api.settings import ConfigSource, Settings, build_config
from megatron_ligo.planning.run_plan import RunPlan, plan_run


def plan(
    small: str | Path | None = None,
    *,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    ffn_size: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    world_size: int = 1,
    device_memory: float = 80e9,
    flops_per_second: float = 300e12,
    config: ConfigSource = None,
    settings: Settings | None = None,
) -> RunPlan:
    """Plans the fit and the pretraining of a growth: `print` it for memory, FLOPs, time, traffic and layouts.

    small: a checkpoint or a config.json; None: that of `config`. world_size: devices, each of `device_memory` bytes
    and `flops_per_second` in the run's precision. config, settings: a run.toml and more of its keys.
    Raises LigoError for sizes that cannot be grown.
    """
    sizes = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_size": ffn_size,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    path = {} if small is None else {"small.path": f"{small}"}
    return plan_run(build_config(config, sizes, settings, path), world_size, device_memory, flops_per_second)

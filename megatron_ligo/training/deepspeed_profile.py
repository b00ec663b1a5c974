"""A DeepSpeed profile: the ZeRO settings of a layout, one of ds_configs/ or a file of the user's own."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.run_config import ParallelSection

PROFILE_FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


def read_profile(parallel: ParallelSection) -> dict:
    """The ZeRO settings of a layout; what the run's config says itself must not be said there."""
    path = Path(parallel.ds_config) if parallel.ds_config else PROFILE_FOLDER / f"zero{parallel.zero}.json"
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"ds_config {path}", "a DeepSpeed profile (JSON)", error)) from None
    stage = table.get("zero_optimization", {}).get("stage")
    if stage != parallel.zero:
        raise ConfigError(Problem(f"ds_config {path}", f"ZeRO stage {parallel.zero}, as the config says", stage))
    return table

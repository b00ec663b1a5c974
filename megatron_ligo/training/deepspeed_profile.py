"""A DeepSpeed profile: the ZeRO settings of a layout, from ds_configs/ or from the user's own file."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.run_config import ParallelSection

log = logging.getLogger(__name__)

PROFILE_FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
# The entry of a run's state: [step, dtype] of each change.
GRADIENT_SUMS = "gradient_sums"


def gradient_sums_dtype(profile: dict) -> str | None:
    """Returns the dtype in which gradients of bf16 weights are summed over micro-batches, outside of pipelines.

    It is fp32 unless the profile sets another. None: that of the weights, as bf16 masters demand.
    """
    if profile.get("bf16", {}).get("bf16_master_weights_and_grads"):
        return None
    return profile.get("data_types", {}).get("grad_accum_dtype", "fp32")


def read_profile(parallel: ParallelSection) -> dict:
    """Reads the ZeRO settings of a layout. ConfigError if the file is not JSON or sets another ZeRO stage."""
    path = Path(parallel.ds_config) if parallel.ds_config else PROFILE_FOLDER / f"zero{parallel.zero}.json"
    try:
        profile = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"ds_config {path}", "a DeepSpeed profile (JSON)", error)) from None
    zero = profile.get("zero_optimization") if isinstance(profile, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != parallel.zero:
        raise ConfigError(Problem(f"ds_config {path}", f"ZeRO stage {parallel.zero}, as the config says", stage))
    return profile


def offloads_weights(parallel: ParallelSection) -> bool:
    """True if the profile keeps the weights of ZeRO 3 on the host."""
    return bool(read_profile(parallel)["zero_optimization"].get("offload_param"))


def note_gradient_sums(state: dict, step: int, current: str, bf16: bool) -> None:
    """Keeps in a run's state from which step on gradients are summed in which dtype, and warns where that changes."""
    # Runs of earlier versions summed in the dtype of the weights.
    sums = state.setdefault(GRADIENT_SUMS, [[0, current if step == 0 else "bf16" if bf16 else "fp32"]])
    if sums[-1][1] != current:
        log.warning(
            "gradients are summed in %s from step %d on; before, the run summed them in %s (data_types of "
            "parallel.ds_config, and the number of stages, choose it).", current, step + 1, sums[-1][1],
        )  # fmt: skip
        sums.append([step, current])

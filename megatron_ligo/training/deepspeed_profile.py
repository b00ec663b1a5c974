"""A DeepSpeed profile: the ZeRO settings of a layout, from ds_configs/ or from the user's own file.

A profile leaves a run's numbers to [fit] and [pretrain]: a key that is not known to do so is refused unless its value
is empty. The few that change numbers within rounding, or the dtypes of the optimizer's state, are bound to the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_ligo.checkpoint.formats.deepspeed.state_keys import ZERO, ZERO_TABLE
from megatron_ligo.checkpoint.source_keys import describe_value, is_empty
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import ParallelSection, TrainingSection

log = logging.getLogger(__name__)

PROFILE_FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
# The entry of a run's state: [step, dtype] of each change.
GRADIENT_SUMS = "gradient_sums"

AUTO, ACCUMULATION = "auto", "gradient_accumulation_steps"
# Keys that the run's config sets, and its own names for them.
KEYS_OF_SECTION = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "clip",
}
# They change numbers, as a choice of precision or traffic: a run keeps them.
BOUND = frozenset({"bf16", "communication_data_type", "seq_parallel_communication_data_type"})
BOUND_ZERO = frozenset({"zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size"})
# A resumed run may change it; it says so (note_gradient_sums).
SUMS = "data_types"
HARMLESS = frozenset(
    """
    aio checkpoint comms_logger compile csv_monitor comet disable_allgather dump_state flops_profiler log_level
    memory_breakdown monitor_config steps_per_print tensorboard timers wall_clock_breakdown wandb
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer activation_checkpointing
    """.split()  # noqa: SIM905
)


def gradient_sums_dtype(profile: dict) -> str | None:
    """Returns the dtype in which gradients of bf16 weights are summed over micro-batches, outside of pipelines.

    It is fp32 unless the profile sets another. None: that of the weights, as bf16 masters demand.
    """
    if profile.get("bf16", {}).get("bf16_master_weights_and_grads"):
        return None
    return profile.get("data_types", {}).get("grad_accum_dtype", "fp32")


def read_profile(parallel: ParallelSection) -> dict:
    """Reads the ZeRO settings of a layout.

    Raises ConfigError if the file is not JSON, sets another ZeRO stage, or has keys that change what is computed.
    """
    path = Path(parallel.ds_config) if parallel.ds_config else PROFILE_FOLDER / f"zero{parallel.zero}.json"
    try:
        profile = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"ds_config {path}", "a DeepSpeed profile (JSON)", error)) from None
    zero = profile.get("zero_optimization") if isinstance(profile, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != parallel.zero:
        raise ConfigError(Problem(f"ds_config {path}", f"ZeRO stage {parallel.zero}, as the config says", stage))
    errors = ErrorCollector(f"ds_config {path}", ConfigError)
    check_profile(profile, errors)
    errors.raise_if_any()
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


def check_profile(profile: Mapping[str, object], errors: ErrorCollector) -> None:
    """Adds an error for each key that may change a run's numbers in a way that the run does not know."""
    known = {ZERO, SUMS, *BOUND, *HARMLESS, *KEYS_OF_SECTION}
    for key, value in profile.items():
        if key == ACCUMULATION and value != AUTO:
            hint = "It follows from global_batch_size, micro_batch_size and the number of processes."
            errors.add(key, f"{AUTO!r}, or no such key", describe_value(value), hint)
        elif key not in known and key != ACCUMULATION and not _is_off(value):
            hint = "Leave it out: the run's own config decides what is computed."
            errors.add(key, "a key of ZeRO, precision, traffic or logging", describe_value(value), hint)
    zero = profile.get(ZERO)
    for key, value in zero.items() if isinstance(zero, Mapping) else ():
        if key != "stage" and key not in ZERO_TABLE.harmless and not _is_off(value):
            hint = ZERO_TABLE.hints.get(key, "Leave it out.")
            errors.add(f"{ZERO}.{key}", "a key that this program knows", describe_value(value), hint)


def check_against_section(profile: Mapping[str, object], section: TrainingSection, errors: ErrorCollector) -> None:
    """Adds an error for each value that the run's config sets otherwise."""
    for key, name in KEYS_OF_SECTION.items():
        stated, value = profile.get(key, AUTO), getattr(section, name)
        if stated != AUTO and stated != value:
            expected = f"{value!r} ({name}), 'auto', or no such key"
            errors.add(key, expected, describe_value(stated), f"Set {name} instead.")


def bound_values(profile: Mapping[str, object]) -> dict[str, object]:
    """Returns what of a profile changes a run's numbers, by key; empty for the profiles of ds_configs/."""
    values = {key: profile[key] for key in BOUND if not _is_off(profile.get(key))}
    values |= {f"{ZERO}.{key}": profile[ZERO][key] for key in BOUND_ZERO if not _is_off(profile[ZERO].get(key))}
    return dict(sorted(values.items()))


def _is_off(value: object) -> bool:
    """True for an empty value, and for a feature's table that is switched off."""
    return is_empty(value) or (isinstance(value, Mapping) and value.get("enabled") is False)

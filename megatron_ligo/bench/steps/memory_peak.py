"""Measures the peak of a rank's tensors over two steps and plans the same peak."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.bench.steps.step_jobs import FitStepper, PretrainStepper, StepJob
from megatron_ligo.planning import memory, parameter_count
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.training.metrics import peak_memory_bytes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters
WARM_UP_MODEL = {
    "small": {"num_layers": 2, "hidden_size": 16, "ffn_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    | {"vocab_size": 32},
    "large": {"num_layers": 2, "hidden_size": 32, "ffn_size": 32, "num_heads": 8, "num_kv_heads": 4},
}


class PeakMemoryProbe:
    """Takes two steps on a rank and records the peak. kind: "plain" or "fit". CPU only: resets the kernel's counter."""

    def __init__(self, kind: str, job: dict):
        stepper_class = PretrainStepper if kind == "plain" else FitStepper
        # A small step first, so that lazily loaded libraries and connections do not count.
        parallel = {**job.get("parallel", {}), "ep": 1}
        stepper_class(StepJob(**{**job, **WARM_UP_MODEL, "tokens": 16, "sequences": 1, "parallel": parallel})).step()
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_bytes()
        step_job = StepJob(**job)
        self.stepper = stepper_class(step_job)
        for _ in range(2):
            self.stepper.step()
        self.peak_bytes = peak_memory_bytes() - before
        self.plan = plan_step_job(kind, step_job, dist.get_world_size())

    def measure(self) -> dict:
        """Returns the stage, its measured bytes and planned bytes by kind, and its actual and planned parameters."""
        stage = self.stepper.mesh.pp_rank
        return {
            "stage": stage,
            "measured": self.peak_bytes,
            "planned": memory.estimate_stage_memory(self.plan, stage),
            "parameters": _count_engine_parameters(self.stepper),
            "counted": count_planned_parameters(self.plan, stage),
        }


def count_planned_parameters(plan: PlannedJob, stage: int) -> int:
    """Counts the trained parameters of a rank, as planned."""
    if plan.operator is None:
        return parameter_count.count_model_on_rank(plan, stage)
    return parameter_count.count_operator_on_rank(plan.operator, plan.parallel.tp, plan.layers_per_stage()[stage])


def plan_step_job(kind: str, job: StepJob, world_size: int) -> PlannedJob:
    """Returns the plan of a benchmark's job."""
    operator = job.build_operator()
    training = job.build_training(world_size // (job.parallel.get("tp", 1) * job.parallel.get("pp", 1)))
    if kind != "fit":
        return PlannedJob(operator.large, training, world_size, job.seq_length, None, job.whole_source)
    options = {"distilled": job.distill > 0, "lagged": job.lagged}
    return PlannedJob(operator.large, training, world_size, job.seq_length, operator, job.whole_source, **options)


def _count_engine_parameters(stepper) -> int:
    """Counts the engine's parameters, including those that ZeRO 3 partitions."""
    parameters = stepper.engine.engine.module.parameters()
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def _return_freed_memory() -> None:
    """Returns freed memory to the system, and sets malloc to return memory freed later at once."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 14)
    libc.mallopt(TRIM_THRESHOLD, 1 << 14)
    gc.collect()
    libc.malloc_trim(0)

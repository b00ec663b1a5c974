"""What a rank's tensors take at most over two steps, measured, beside what the plan says."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.bench.steps.step_jobs import FitStepper, PretrainStepper, StepJob
from megatron_ligo.plan import memory, parameter_count
from megatron_ligo.plan.planned_job import PlannedJob as Planned
from megatron_ligo.training.metrics import peak_memory_bytes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names
WARM_UP_MODEL = {
    "small": {"num_layers": 2, "hidden_size": 16, "ffn_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    | {"vocab_size": 32},
    "large": {"num_layers": 2, "hidden_size": 32, "ffn_size": 32, "num_heads": 8, "num_kv_heads": 4},
}


class PeakMemoryProbe:
    """A rank that takes two steps. kind: "plain" or "fit". On a CPU, for memory there can be taken back."""

    def __init__(self, kind: str, job: dict):
        maker = PretrainStepper if kind == "plain" else FitStepper
        # What libraries load at their first use and what connections hold is not a run's.
        maker(StepJob(**{**job, **WARM_UP_MODEL, "tokens": 16, "sequences": 1})).step()
        _return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_bytes()
        made = StepJob(**job)
        self.stepper = maker(made)
        for _ in range(2):
            self.stepper.step()
        self.held = peak_memory_bytes() - before
        self.plan = plan_step_job(kind, made, dist.get_world_size())

    def found(self) -> dict:
        """stage, measured and planned bytes by kind, and the numbers of the engine's parameters, found and counted."""
        stage = self.stepper.mesh.pp_rank
        return {
            "stage": stage,
            "measured": self.held,
            "planned": memory.estimate_stage_memory(self.plan, stage),
            "parameters": _count_engine_parameters(self.stepper),
            "counted": count_planned_parameters(self.plan, stage),
        }


def count_planned_parameters(plan: Planned, stage: int) -> int:
    if plan.operator is None:
        return parameter_count.count_model_on_rank(plan, stage)
    return parameter_count.count_operator_on_rank(plan.operator, plan.parallel.tp, plan.layers_per_stage()[stage])


def plan_step_job(kind: str, job: StepJob, world: int) -> Planned:
    operator = job.operator_made()
    layout = job.parallel
    run = job.run(world // (layout.get("tp", 1) * layout.get("pp", 1)))
    chosen = operator if kind == "fit" else None
    more = {} if chosen is None else {"distilled": job.distill > 0, "lagged": job.lagged}
    return Planned(operator.large, run, world, job.seq_length, chosen, job.whole_source, **more)


def _count_engine_parameters(stepper) -> int:
    """Of the engine's parameters, those that ZeRO 3 has divided as well."""
    return sum(getattr(one, "ds_numel", one.numel()) for one in stepper.engine.engine.module.parameters())


def _return_freed_memory() -> None:
    """Freed memory to the system, now and from now on at once."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 14)
    libc.mallopt(TRIM_THRESHOLD, 1 << 14)
    gc.collect()
    libc.malloc_trim(0)

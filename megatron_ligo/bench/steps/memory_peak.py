"""What a rank's tensors take at most over two steps, measured, beside what the plan says."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.bench.steps.step_jobs import FitStepper, Job, PlainStepper
from megatron_ligo.plan import memory, parameter_count
from megatron_ligo.plan.planned_job import Job as Planned
from megatron_ligo.training.metrics import peak_memory_bytes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names
TINY = {
    "small": {"num_layers": 2, "hidden_size": 16, "ffn_size": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    | {"vocab_size": 32},
    "large": {"num_layers": 2, "hidden_size": 32, "ffn_size": 32, "num_heads": 8, "num_kv_heads": 4},
}


class Peak:
    """A rank that takes two steps. kind: "plain" or "fit". On a CPU, for memory there can be taken back."""

    def __init__(self, kind: str, job: dict):
        maker = PlainStepper if kind == "plain" else FitStepper
        # What libraries load at their first use and what connections hold is not a run's.
        maker(Job(**{**job, **TINY, "tokens": 16, "sequences": 1})).step()
        _give_back()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory_bytes()
        made = Job(**job)
        self.stepper = maker(made)
        for _ in range(2):
            self.stepper.step()
        self.held = peak_memory_bytes() - before
        self.plan = planned(kind, made, dist.get_world_size())

    def found(self) -> dict:
        """stage, measured and planned bytes by kind, and the numbers of the engine's parameters, found and counted."""
        stage = self.stepper.mesh.pp_rank
        return {
            "stage": stage,
            "measured": self.held,
            "planned": memory.stage(self.plan, stage),
            "parameters": _numbers(self.stepper),
            "counted": counted(self.plan, stage),
        }


def counted(plan: Planned, stage: int) -> int:
    if plan.operator is None:
        return parameter_count.model_rank(plan, stage)
    return parameter_count.operator_rank(plan.operator, plan.parallel.tp, plan.stages()[stage])


def planned(kind: str, job: Job, world: int) -> Planned:
    operator = job.operator_made()
    layout = job.parallel
    run = job.run(world // (layout.get("tp", 1) * layout.get("pp", 1)))
    chosen = operator if kind == "fit" else None
    more = {} if chosen is None else {"distilled": job.distill > 0, "lagged": job.lagged}
    return Planned(operator.large, run, world, job.seq_length, chosen, job.whole_source, **more)


def _numbers(stepper) -> int:
    """Of the engine's parameters, those that ZeRO 3 has divided as well."""
    return sum(getattr(one, "ds_numel", one.numel()) for one in stepper.engine.engine.module.parameters())


def _give_back() -> None:
    """Freed memory to the system, now and from now on at once."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 14)
    libc.mallopt(TRIM_THRESHOLD, 1 << 14)
    gc.collect()
    libc.malloc_trim(0)

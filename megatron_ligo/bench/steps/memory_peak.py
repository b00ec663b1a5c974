"""Measures the peak of a rank's tensors over two steps and plans the same peak."""

from __future__ import annotations

import torch.distributed as dist

from megatron_ligo.bench.steps.fake_device import DeviceCounter
from megatron_ligo.bench.steps.step_jobs import FitStepper, PretrainStepper, StepJob
from megatron_ligo.planning import memory, parameter_count
from megatron_ligo.planning.planned_job import PlannedJob


class PeakMemoryProbe:
    """Takes two steps on a rank and counts the bytes of its living tensors. kind: "plain" or "fit".

    Pages that a tensor never touches count too, as on a GPU.
    """

    def __init__(self, kind: str, job: dict):
        stepper_class = PretrainStepper if kind == "plain" else FitStepper
        step_job = StepJob(**job)
        counter = DeviceCounter()
        with counter:
            self.stepper = stepper_class(step_job)
            for _ in range(2):
                self.stepper.step()
        self.peak_bytes = counter.peak
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

"""Fits and pretraining runs of given sizes on random weights and tokens, driven step by step and measured."""

from __future__ import annotations

import resource
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.reader import Reader, TensorInfo
from megatron_ligo.config.run_config import LargeSection, OperatorSection, ParallelSection, TrainingSection
from megatron_ligo.distributed import device, mesh
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.training.metrics import peak_memory_bytes

SEED = 1234
ROUTER_AUX_LOSS = 0.01


@dataclass
class StepJob:
    """The job of a benchmark: sizes, layout, tokens. micro_batches: per data-parallel rank and step."""

    small: dict
    large: dict
    tokens: int = 512
    sequences: int = 1  # per micro-batch of `tokens` tokens
    micro_batches: int = 1
    operator: dict = field(default_factory=dict)
    parallel: dict = field(default_factory=dict)
    recompute: bool = False
    precision: str = "fp32"
    whole_source: bool = False
    distill: float = 0.0
    lagged: bool = False

    @property
    def seq_length(self) -> int:
        return self.tokens // self.sequences

    def build_small_config(self) -> ModelConfig:
        fixed = {"arch": "llama", "model_type": "llama", "max_positions": 8192, "norm_eps": 1e-5, "tied": True}
        return ModelConfig(**{**fixed, "rope_base": 10000.0, **self.small})

    def build_operator(self):
        return build_initial_operator(
            self.build_small_config(), LargeSection(**self.large), OperatorSection(**self.operator)
        )

    def build_training(self, dp: int) -> TrainingSection:
        return TrainingSection(
            global_batch_size=self.sequences * self.micro_batches * dp,
            micro_batch_size=self.sequences,
            recompute=self.recompute,
            precision=self.precision,
            lr=1e-5,
            parallel=ParallelSection(**self.parallel),
        )


class RandomWeightsReader(Reader):
    """Reads freshly initialised weights, like those of pretraining from scratch."""

    format, path = "drawn", None

    def __init__(self, model_config: ModelConfig):
        from megatron_ligo.models.full import parameters

        self.model_config = model_config
        self._read = parameters.build_initial_weights(model_config, SEED)

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), torch.float32)

    def read(self, key: str, kind: str = "weight") -> torch.Tensor:
        """Returns the whole fp32 tensor of a canonical key, in its global shape."""
        return self._read(key)


class EngineStepper(ABC):
    """One rank's engine, stepped on random batches."""

    def __init__(self, job: StepJob):
        self.baseline = _resident_bytes()
        self.job = job
        parallel = ParallelSection(**job.parallel)
        self.traffic = GroupTraffic()
        self.mesh = mesh.build_mesh(parallel.tp, parallel.pp, parallel.ep, parallel.cp)
        self.dtype = device.resolve_dtype(job.precision)
        torch.manual_seed(SEED)
        self.engine = self.build()
        self.parameters = sum(parameter.numel() for parameter in self.engine.engine.module.parameters())

    @abstractmethod
    def build(self):
        """Builds the engine to measure."""

    def step(self) -> dict[str, float]:
        """Takes one step. Returns its wall-clock and processor seconds, tensor-parallel bytes sent, and loss."""
        job = self.job
        generator = torch.Generator().manual_seed(SEED + self.mesh.dp_rank)
        shape = (job.micro_batches, job.sequences, job.seq_length + 1)
        ids = torch.randint(0, job.build_small_config().vocab_size, shape, generator=generator)
        batches = [{"tokens": part[:, :-1], "labels": part[:, 1:].contiguous()} for part in ids]
        for batch in batches:
            batch["loss_mask"] = torch.ones(job.sequences, job.seq_length)
        dist.barrier()
        self.traffic.start(self.mesh.tp_group)
        wall_start, cpu_start = time.monotonic(), time.process_time()
        loss, _ = self.engine.train_step(batches)
        dist.barrier()
        return {
            "seconds": time.monotonic() - wall_start,
            "cpu": time.process_time() - cpu_start,
            "tp_bytes": self.traffic.stop(),
            "loss": loss,
        }

    def memory(self) -> dict[str, int]:
        """Returns the peak and the baseline before the engine was built, in bytes, and the number of parameters."""
        return {"peak": peak_memory_bytes(), "baseline": self.baseline, "parameters": self.parameters}


class FitStepper(EngineStepper):
    def build(self):
        from megatron_ligo.models.factored.context import FactoredContext
        from megatron_ligo.models.factored.factored_model import FactoredModel, FactoredPipeline
        from megatron_ligo.models.factored.small_weights import SmallWeights
        from megatron_ligo.training.engine import Engine

        job, operator = self.job, self.job.build_operator()
        zero = job.parallel.get("zero", 1)
        micro_batches_per_build = 1 if zero == 3 else job.micro_batches
        context = FactoredContext(
            operator,
            SmallWeights(operator, RandomWeightsReader(operator.small), self.mesh, zero, job.whole_source),
            self.mesh,
            self.dtype,
            micro_batches=micro_batches_per_build,
            tokens_per_step=micro_batches_per_build * job.tokens,
            recompute=job.recompute,
            sequence_parallel=job.parallel.get("sequence_parallel", False),
            gradients_each=zero == 2,
            teacher=self._teacher() if job.distill else None,
            lag=RandomWeightsReader(operator.large).read if job.lagged else None,
            router_aux_loss=ROUTER_AUX_LOSS,
        )
        module = FactoredPipeline(context) if self.mesh.pp > 1 else FactoredModel(context)
        groups = [{"params": list(module.parameters()), "weight_decay": 0.0}]
        return Engine(
            module,
            self.mesh.without_experts(),
            job.build_training(self.mesh.dp),
            groups,
            after_update=module.step_state.mark_updated,
        )

    def _teacher(self):
        from megatron_ligo.models.factored.teacher import Teacher

        job = self.job
        return Teacher(
            RandomWeightsReader(job.build_small_config()),
            self.mesh,
            self.dtype,
            job.distill,
            "sequence_parallel" in job.parallel,
        )


class PretrainStepper(EngineStepper):
    def build(self):
        from megatron_ligo.models.full import parameters
        from megatron_ligo.models.full.factory import build_model
        from megatron_ligo.models.mcore.layer_spec import BuildOptions
        from megatron_ligo.training.engine import Engine, build_parameter_groups

        job, model_config = self.job, self.job.build_operator().large
        build = BuildOptions(self.dtype, self.mesh.tp, job.parallel.get("sequence_parallel", False))
        model = build_model(model_config, build, self.mesh, job.recompute)
        parameters.fill_parameters(model, model_config, self.mesh, parameters.build_initial_weights(model_config, SEED))
        bf16 = self.dtype is torch.bfloat16
        return Engine(model, self.mesh, job.build_training(self.mesh.dp), build_parameter_groups(model, 0.1), bf16)


class GroupTraffic:
    """Counts the bytes that this rank sends over a group under ring collectives. Wraps torch.distributed."""

    def __init__(self) -> None:
        self.group, self.bytes = None, 0.0
        dist.all_reduce = self._wrap(dist.all_reduce, "tensor", 2.0)
        dist.all_gather_into_tensor = self._wrap(dist.all_gather_into_tensor, "output_tensor", 1.0)
        dist.reduce_scatter_tensor = self._wrap(dist.reduce_scatter_tensor, "input", 1.0)

    def _wrap(self, collective, argument: str, passes: float):
        position = {"tensor": 0, "output_tensor": 0, "input": 1}[argument]

        def counted(*args, **kwargs):
            group = kwargs.get("group")
            if self.group is not None and group is self.group:
                tensor = kwargs[argument] if argument in kwargs else args[position]
                ranks = dist.get_world_size(group)
                self.bytes += passes * (ranks - 1) / ranks * tensor.numel() * tensor.element_size()
            return collective(*args, **kwargs)

        return counted

    def start(self, group) -> None:
        self.group, self.bytes = group, 0.0

    def stop(self) -> float:
        self.group = None
        return self.bytes


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

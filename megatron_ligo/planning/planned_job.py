"""The planned job: a fit or a pretraining run of given sizes, on a number of processes, at a layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import ParallelSection, TrainingSection
from megatron_ligo.growth.operator import Operator
from megatron_ligo.models.factored.fit_flops import fit_step_flops
from megatron_ligo.sharding.pipeline_layers import stage_bounds
from megatron_ligo.sharding.tensor_parallel import exchanged_kv_heads

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class PlannedJob:
    """A fit if `operator` is given, otherwise a pretraining run of `large`. `training` sets the batch and the layout.

    source_bytes: bytes per element of the small model's matrices (2 if they are exactly representable in bf16, else 4).
    distilled: the whole small model is also held, as the teacher.
    lagged: the lag, a change of every large weight, is also held.
    """

    large: ModelConfig
    training: TrainingSection
    world_size: int
    seq_length: int
    operator: Operator | None = None
    whole_source: bool = False
    source_bytes: int = 4
    distilled: bool = False
    lagged: bool = False

    @property
    def parallel(self) -> ParallelSection:
        return self.training.parallel

    @property
    def dp(self) -> int:
        return self.world_size // (self.parallel.tp * self.parallel.pp * self.parallel.cp)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, and share optimizer states under ZeRO."""
        # Expert-parallel ranks of a fit have all maps.
        divided = self.parallel.ep if self.operator is None else 1
        return self.dp * self.parallel.cp // divided

    @property
    def exchanged_kv_heads(self) -> int:
        """Key-value heads of all tensor-parallel ranks that context-parallel ranks exchange, repeated ones included."""
        heads, groups, tp = self.large.num_heads, self.large.num_kv_heads, self.parallel.tp
        return tp * exchanged_kv_heads(heads // tp, groups // tp, self.parallel.cp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per data-parallel rank and step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.dp)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.training.micro_batch_size * self.seq_length // self.parallel.cp

    @property
    def element_bytes(self) -> int:
        """Bytes per element of activations, and of a pretraining run's weights."""
        return DTYPE_BYTES[self.training.precision]

    @property
    def micro_batches_per_build(self) -> int:
        """Micro-batches that share the tensors that a fit builds from the operator."""
        return 1 if self.parallel.zero == 3 else self.micro_batches

    def layers_per_stage(self) -> list[int]:
        bounds = stage_bounds(self.large.num_layers, self.parallel.pp)
        return [last - first for first, last in itertools.pairwise(bounds)]

    def step_flops(self) -> int:
        """FLOPs of one step over all ranks, without recomputation and redundant tensor-parallel work."""
        tokens = self.training.global_batch_size * self.seq_length
        if self.operator is not None:
            return fit_step_flops(self.operator, tokens, self.seq_length, self.distilled, self.lagged)
        return train_flops(self.large, tokens, self.seq_length)

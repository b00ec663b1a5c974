"""What is planned: a fit or a pretraining of given sizes, on so many processes, at a layout."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import ParallelSection, TrainingSection
from megatron_ligo.growth.fit_flops import fit_step_flops
from megatron_ligo.growth.operator import Operator
from megatron_ligo.sharding.tensor_parallel import stage_bounds

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class PlannedJob:
    """operator: that of a fit; None plans a pretraining of `large`. The run's config says the batch and the layout.

    source_bytes: of one number of the small model's matrices (2 where they are bf16 to the bit, else 4).
    distilled: the small model teaches, whole. lagged: what training has added stands beside the maps.
    """

    large: ModelConfig
    run: TrainingSection
    world: int
    seq_length: int
    operator: Operator | None = None
    whole_source: bool = False
    source_bytes: int = 4
    distilled: bool = False
    lagged: bool = False

    @property
    def parallel(self) -> ParallelSection:
        return self.run.parallel

    @property
    def dp(self) -> int:
        return self.world // (self.parallel.tp * self.parallel.pp)

    @property
    def micro_batches(self) -> int:
        return self.run.global_batch_size // (self.run.micro_batch_size * self.dp)

    @property
    def micro_batch_tokens(self) -> int:
        """Of a micro-batch."""
        return self.run.micro_batch_size * self.seq_length

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in activations (and in a pretraining's weights)."""
        return DTYPE_BYTES[self.run.precision]

    @property
    def micro_batches_per_build(self) -> int:
        """Micro-batches that share what a fit builds once a step."""
        return 1 if self.parallel.zero == 3 else self.micro_batches

    def layers_per_stage(self) -> list[int]:
        """Layers of each stage."""
        bounds = stage_bounds(self.large.num_layers, self.parallel.pp)
        return [last - first for first, last in itertools.pairwise(bounds)]

    def step_flops(self) -> int:
        """Of one step over all ranks; recomputation and what tensor-parallel ranks do twice are not counted."""
        tokens = self.run.global_batch_size * self.seq_length
        if self.operator is not None:
            return fit_step_flops(self.operator, tokens, self.seq_length, self.distilled, self.lagged)
        return train_flops(self.large, tokens, self.seq_length)

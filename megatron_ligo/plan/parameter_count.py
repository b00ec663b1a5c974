"""How many numbers a rank holds: of the model to pretrain, of the operator, of the small model."""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.growth.operator import Operator
from megatron_ligo.plan.planned_job import PlannedJob
from megatron_ligo.sharding.tensor_parallel import padded_vocab


def count_model(model_config: ModelConfig) -> int:
    """Numbers of a whole model, as a checkpoint stores them."""
    rows = [row for row in architectures.get(model_config.arch).rows if row.stored(model_config)]
    return sum(prod(row.shape(model_config)) * (model_config.num_layers if row.in_layer else 1) for row in rows)


def count_layer(model_config: ModelConfig, tp: int) -> int:
    """Numbers of one layer on a tensor-parallel rank."""
    rows = architectures.get(model_config.arch).layer_rows(model_config)
    return sum(prod(row.shape(model_config)) // (1 if row.split is None else tp) for row in rows)


def count_outside_layers(model_config: ModelConfig, tp: int, first: bool, last: bool) -> int:
    """Numbers outside the layers on a stage's rank: embeddings on the first one, final norm and head on the last."""
    found = 0
    for row in architectures.get(model_config.arch).rows:
        if row.in_layer or not row.exists(model_config):
            continue
        shape = list(row.shape(model_config))
        if row.split is not None:
            shape[row.split] = padded_vocab(shape[row.split], tp) // tp
        tied = bool(row.tied_to) and model_config.tied
        here = first if row.key.endswith("embed") or "position" in row.key else last
        # A tied head is the embedding itself, of which a last stage apart from the first has its own.
        if here and not (tied and first):
            found += prod(shape)
    return found


def count_model_on_rank(job: PlannedJob, stage: int) -> int:
    """Numbers of the model to pretrain on a rank of a stage."""
    tp, last = job.parallel.tp, job.parallel.pp - 1
    return job.layers_per_stage()[stage] * count_layer(job.large, tp) + count_outside_layers(
        job.large, tp, stage == 0, stage == last
    )


def count_operator_on_rank(operator: Operator, tp: int, layers: int) -> int:
    """Numbers of the operator that a rank of a stage with so many layers holds, its frozen rows among them."""
    found = 0
    for spec in operator.maps.values():
        sides = 2 if operator.has_contract(spec.name) else 1
        rank, cut = operator.rank(spec.name), tp if spec.split else 1
        one = rank * (spec.large // cut + spec.small) if rank else spec.large // cut * spec.small
        found += sides * one * (layers if operator.has_one_a_layer(spec.name) else 1)
    rows = len(operator.arch.layer_rows(operator.large))
    return found + layers * rows * operator.small.num_layers

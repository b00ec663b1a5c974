"""Counts the parameters that a rank holds: of the model to pretrain, of the operator, of the small model."""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import UNTRAINED_PARTS, Stage
from megatron_ligo.growth.operator import Operator
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.sharding.tensor_parallel import padded_vocab


def count_model(model_config: ModelConfig) -> int:
    """Counts the parameters of a whole model, as a checkpoint stores them."""
    specs = [spec for spec in architectures.get(model_config.arch).params if spec.is_stored(model_config)]
    return sum(prod(spec.shape(model_config)) * spec.copies(model_config) for spec in specs)


def count_active(model_config: ModelConfig) -> int:
    """Counts the parameters that a token passes: all but those of the experts that it is not routed to."""
    idle = model_config.num_experts - model_config.top_k
    return count_model(model_config) - model_config.num_layers * idle * count_expert(model_config, 1)


def count_expert(model_config: ModelConfig, tp: int) -> int:
    """Counts the parameters of one expert of one layer on a tensor-parallel rank."""
    specs = architectures.get(model_config.arch).layer_params(model_config)
    return sum(prod(spec.shape(model_config)) // tp for spec in specs if spec.in_expert)


def count_layer(model_config: ModelConfig, tp: int, layer: int | None = None, ep: int = 1) -> int:
    """Counts the parameters of one layer, or of any layer but the first, on a tensor- and expert-parallel rank."""
    specs = architectures.get(model_config.arch).layer_params(model_config, layer)
    shared = [spec for spec in specs if not spec.in_expert]
    count = sum(prod(spec.shape(model_config)) // (1 if spec.tp_dim is None else tp) for spec in shared)
    return count + model_config.num_experts // ep * count_expert(model_config, tp)


def count_outside_layers(model_config: ModelConfig, tp: int, first: bool, last: bool) -> int:
    """Counts the model's parameters outside the layers on a rank of the first stage, the last stage, or both."""
    total, arch = 0, architectures.get(model_config.arch)
    for spec in arch.params:
        if spec.in_layer or not spec.exists(model_config) or spec.requires in UNTRAINED_PARTS:
            continue
        shape = list(spec.shape(model_config))
        if spec.tp_dim is not None:
            shape[spec.tp_dim] = padded_vocab(shape[spec.tp_dim], tp) // tp
        is_tied = bool(spec.tied_to) and model_config.tied
        is_held = first if spec.stage is Stage.FIRST else last
        # A tied head shares the embedding's tensor; the last stage of a pipeline holds a copy of its own. What is tied
        # to a tensor of its own stage never has one.
        if is_held and not (is_tied and (first or arch.param(spec.tied_to).stage is spec.stage)):
            total += prod(shape)
    return total


def count_model_on_rank(job: PlannedJob, stage: int) -> int:
    """Counts the parameters of the model to pretrain on a rank of a stage."""
    tp, last = job.parallel.tp, job.parallel.pp - 1
    layers = job.layers_per_stage()[stage] * count_layer(job.large, tp, ep=job.parallel.ep)
    if stage == 0:
        layers += count_layer(job.large, tp, 0) - count_layer(job.large, tp)
    return layers + count_outside_layers(job.large, tp, stage == 0, stage == last)


def count_largest(model_config: ModelConfig, tp: int) -> int:
    """Counts the elements of a rank's largest parameter; an expert's matrices count alone."""
    largest = 0
    for spec in architectures.get(model_config.arch).params:
        if spec.exists(model_config):
            shape = list(spec.shape(model_config))
            if spec.tp_dim is not None:
                outside = not spec.in_layer
                shape[spec.tp_dim] = (padded_vocab(shape[spec.tp_dim], tp) if outside else shape[spec.tp_dim]) // tp
            largest = max(largest, prod(shape))
    return largest


def count_operator_on_rank(operator: Operator, tp: int, layers: int) -> int:
    """Counts the operator's parameters, frozen ones included, on a rank of a stage that holds `layers` layers."""
    total = 0
    for spec in operator.maps.values():
        if spec.name in operator.untrained_maps:
            continue
        sides = 2 if operator.has_contract(spec.name) else 1
        rank, parts = operator.rank(spec.name), tp if spec.is_sharded else 1
        elements = rank * (spec.large // parts + spec.small) if rank else spec.large // parts * spec.small
        total += sides * elements * (layers if operator.has_map_per_layer(spec.name) else 1)
    depth_maps = len(operator.arch.layer_params(operator.large))
    routers = operator.large.num_experts * operator.large.hidden_size if operator.draws_routers else 0
    return total + layers * (depth_maps * operator.small.num_layers + routers)

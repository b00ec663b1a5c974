"""A short fit of the sharded, factored model on real DeepSpeed engines, for ranks to run."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import ParallelSection, TrainingSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.models.factored import context, factored_experts, map_parameters, small_weights, step_state
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel, FactoredPipeline
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.training.checkpointing.gather_operator import gather_operator
from megatron_ligo.training.engine import Engine
from tests import decoder_models, image_models, layer_pattern_models
from tests.growth import official_ligo
from tests.layer_norm_models import config_of
from tests.models import dispatch_on_cpu
from tests.models.factored.fit_reference import AUX_LOSS, lag_of, make_operator, source_of
from tests.models.factored.reference_growth import materialise
from tests.tiny_models import llama_config, tokens

SMALL = {"num_kv_heads": 4, "num_heads": 8, "head_dim": 4, "hidden_size": 24, "ffn_size": 28, "num_layers": 2}
LARGE = {"num_layers": 5, "hidden_size": 32, "ffn_size": 48, "num_heads": 16, "num_kv_heads": 8}
BATCH, LENGTH, STEPS = 8, 12, 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def small_dims(changes: dict) -> ModelConfig:
    """A small Llama, or a small model of the family that the changes name."""
    if changes.get("arch") in ("mixtral", "olmoe", "qwen2_moe"):
        routing = {"model_type": changes["arch"], "renormalises_routing": changes["arch"] == "mixtral"}
        routing |= {"qkv_bias": changes["arch"] == "qwen2_moe"}
        return llama_config(**{**SMALL, **routing, **changes})
    if changes.get("arch", "llama") == "llama":
        return llama_config(**{**SMALL, **changes})
    if changes["arch"] in image_models.OWN:
        return image_models.image_config(
            changes["arch"], **{**SMALL, **{k: v for k, v in changes.items() if k != "arch"}}
        )
    if changes["arch"] in decoder_models.OWN:
        own = {k: v for k, v in changes.items() if k != "arch"}
        return decoder_models.config_of(changes["arch"], **{**SMALL, **own})
    if changes["arch"] in layer_pattern_models.OWN:
        sizes = {**SMALL, **{name: value for name, value in changes.items() if name != "arch"}}
        return layer_pattern_models.config_of(changes["arch"], **sizes)
    return config_of(
        changes["arch"], changes["class"], **{**SMALL, **{k: v for k, v in changes.items() if k != "class"}}
    )


def batches(model_config, steps: int = STEPS, batch: int = BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if model_config.image_size is not None:
        seeds = range(100, 100 + steps)
        return [
            (image_models.pictures(model_config, batch, seed), image_models.labels(model_config, batch, seed))
            for seed in seeds
        ]
    drawn = [tokens(model_config, batch, LENGTH + 1, seed=100 + step) for step in range(steps)]
    return [(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) for ids in drawn]


def micro(batch, mesh, size: int) -> list[dict]:
    """This rank's micro-batches: sample (m dp + r) size + i of the batch."""
    ids, labels = batch
    count = len(ids) // (mesh.dp * size)
    parts = []
    for m in range(count):
        first = (m * mesh.dp + mesh.dp_rank) * size
        rows = slice(first, first + size)
        parts.append({"tokens": ids[rows], "labels": labels[rows], "loss_mask": torch.ones(labels[rows].shape)})
    return parts


@contextmanager
def unreduced():
    """Partial uses whose gradients are not summed over the tensor-parallel ranks."""
    with without_reduction(context), without_reduction(small_weights), without_reduction(step_state):
        yield


def without_reduction(module):
    return mock.patch.object(module, "copy_to", lambda x, group: x)


@contextmanager
def experts_averaged():
    """Gradients of what experts read and compute, averaged over the expert-parallel ranks."""
    run = factored_experts.FactoredExperts._run

    def wrong(self, *arguments):
        output = run(self, *arguments)
        return output.detach() + (output - output.detach()) / self.context.mesh.ep

    with mock.patch.object(factored_experts.FactoredExperts, "_run", wrong):
        yield


@contextmanager
def routers_unreduced():
    """Routers whose gradients are not summed over the tensor-parallel ranks."""
    forward = map_parameters.RouterParameters.forward

    def wrong(self):
        with without_reduction(map_parameters):
            return forward(self)

    with mock.patch.object(map_parameters.RouterParameters, "forward", wrong):
        yield


SABOTAGE = {
    "experts_averaged": experts_averaged,
    "routers_unreduced": routers_unreduced,
    None: nullcontext,
    "unreduced": unreduced,
    "maps_unreduced": lambda: without_reduction(map_parameters),
    "gains_unreduced": lambda: without_reduction(step_state),
    "hook_on_grad": nullcontext,
    "unmarked": nullcontext,
}


def _all_reduced(grad, group):
    grad = grad.clone()
    dist.all_reduce(grad, group=group)
    return grad


def fit(
    tp=1,
    pp=1,
    cp=1,
    zero=1,
    micro_size=2,
    optimizer="adamw",
    lr=1e-3,
    clip=0.05,
    settings=None,
    small=None,
    large=None,
    recompute=False,
    tokens_at_once=64,
    sabotage=None,
    ds_config="",
    precision="fp32",
    sequence_parallel=False,
    whole_source=False,
    lagged=False,
    steps=STEPS,
    ep=1,
    batch=BATCH,
):
    """Fits some steps in a layout. Rank 0 returns (losses, gradient norms, operator, grown weights, last fp32 loss)."""
    small = small_dims(small or {})
    mesh = meshes.build_mesh(tp, pp, ep, cp)
    operator = make_operator(small, {**LARGE, **(large or {})}, settings or {})
    source_reader = source_of(small, operator)
    run = TrainingSection(
        steps=steps,
        optimizer=optimizer,
        lr=lr,
        clip=clip,
        global_batch_size=batch,
        micro_batch_size=micro_size,
        parallel=ParallelSection(
            tp=tp, pp=pp, cp=cp, zero=zero, ds_config=ds_config, sequence_parallel=sequence_parallel
        ),
    )
    shared = FactoredContext(
        operator,
        SmallWeights(operator, source_reader, mesh, zero, whole_source),
        mesh,
        DTYPES[precision],
        micro_batches=1 if zero == 3 else batch // (mesh.dp * micro_size),
        tokens_per_step=tokens_at_once,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
        gradients_each=zero == 2,
        lag=lag_of(operator).__getitem__ if lagged else None,
        router_aux_loss=AUX_LOSS,
    )
    with SABOTAGE[sabotage]():
        return _run(shared, run, micro_size, source_reader, sabotage)


def _run(shared, run, micro_size, source_reader, sabotage):
    mesh, operator = shared.mesh, shared.operator
    module = FactoredPipeline(shared) if mesh.pp > 1 else FactoredModel(shared)
    if sabotage == "hook_on_grad":
        for parameter in module.shared_maps().parameters():
            if not hasattr(parameter, "tensor_model_parallel"):
                parameter.register_hook(lambda grad: _all_reduced(grad, mesh.tp_group))
    if sabotage == "unmarked":
        for parameter in module.parameters():
            parameter.__dict__.pop("tensor_model_parallel", None)

    groups = [{"params": list(module.parameters()), "weight_decay": 0.0}]
    engine = Engine(module, mesh.without_experts(), run, groups, after_update=module.step_state.mark_updated)
    losses, norms = [], []
    for batch in batches(operator.large, run.steps, run.global_batch_size):
        loss, norm = engine.train_step(micro(batch, mesh, micro_size))
        losses.append(loss)
        norms.append(norm)
    values = gather_operator(module, shared)
    with module.step_state.computing_in(torch.float32):
        afterwards = engine.evaluate(micro(batches(operator.large, 1, run.global_batch_size)[0], mesh, micro_size))
    engine.engine.destroy()
    if not values:
        return None
    with torch.no_grad():
        return losses, norms, values, materialise(operator, source_reader, values), afterwards


def fit_at_each(cases: list[dict], dispatcher: str = "") -> list[tuple | None]:
    """Runs `fit` with each set of arguments, one after the other. dispatcher: of tokens to experts."""
    with dispatch_on_cpu.all_to_all() if dispatcher == "alltoall" else nullcontext():
        return [fit(**case) for case in cases]


def official_numbers(path: str, head_dim: int, tp=1, pp=1, sequence_parallel=False) -> tuple[float, dict] | None:
    """(loss of the fixture's ids, each telling the one before, and the grown weights), on rank 0: as the fit begins."""
    case = official_ligo.load(Path(path), head_dim)
    tensors = {name: tensor.float() for name, tensor in case.operator.tensors.items()}
    operator = official_ligo.Given(case.operator.small, case.operator.large, case.operator.settings, tensors)
    mesh = meshes.build_mesh(tp, pp)
    size = len(case.ids)
    run = TrainingSection(
        global_batch_size=size * mesh.dp,
        micro_batch_size=size,
        parallel=ParallelSection(tp=tp, pp=pp, sequence_parallel=sequence_parallel),
    )
    shared = FactoredContext(
        operator, SmallWeights(operator, case.source, mesh, 1), mesh, torch.float32, sequence_parallel=sequence_parallel
    )
    module = FactoredPipeline(shared) if pp > 1 else FactoredModel(shared)
    engine = Engine(module, mesh, run, [{"params": list(module.parameters()), "weight_decay": 0.0}])
    mask = torch.ones(case.ids.shape)
    loss = engine.evaluate([{"tokens": case.ids, "labels": case.ids.roll(1, dims=1), "loss_mask": mask}])
    values = gather_operator(module, shared)
    engine.engine.destroy()
    if not values:
        return None
    grown = GrownReader(official_ligo.Given(operator.small, operator.large, operator.settings, values), case.source)
    return loss, {key: grown.read(key) for key in grown.keys()}  # noqa: SIM118

"""Cases on test ranks: real engines whose updates are refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.training.engine import Engine, build_parameter_groups
from megatron_ligo.training.guard.update_size import UpdateSize
from tests.models.full.pretrain_cases import BATCH, micro, sizes

STEPS, REFUSED = 5, 2


def build_engine(
    layout: dict, bf16: bool = False, profile: dict | None = None, decay: float = 0.1, **changes
) -> Engine:
    model_config = sizes(True)
    mesh = meshes.build_mesh(layout.get("tp", 1), layout.get("pp", 1))
    torch.manual_seed(7)
    model = build_model(model_config, BuildOptions(torch.bfloat16 if bf16 else torch.float32, mesh.tp), mesh)
    parameters.fill_parameters(model, model_config, mesh, parameters.build_initial_weights(model_config, 7))
    path = ""
    if profile:
        path = str(Path(tempfile.mkdtemp()) / "profile.json")
        Path(path).write_text(json.dumps(profile))
    parallel = ParallelSection(tp=mesh.tp, pp=mesh.pp, zero=layout.get("zero", 1), ds_config=path)
    settings = {"global_batch_size": BATCH, "micro_batch_size": 2, "lr": 1e-2, **changes}
    section = PretrainSection(**settings, parallel=parallel)
    return Engine(model, mesh, section, build_parameter_groups(model, decay), bf16)


def snapshot(engine: Engine) -> list[torch.Tensor]:
    """Returns copies of this rank's weights, and of the masters, moments and step counts of its optimizer."""
    optimizer = engine.engine.optimizer
    tensors = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    for flat, state in optimizer.optimizer.state.items():
        tensors += [flat, *(value for value in state.values() if torch.is_tensor(value))]
    return [tensor.detach().clone() for tensor in tensors]


def refuse_a_step(layout: dict, bf16: bool = False, profile: dict | None = None) -> dict:
    """Trains, and refuses the update of step REFUSED; the others continue as if it had not been."""
    engine, asked = build_engine(layout, bf16, profile), []

    def refuse(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return len(asked) - 1 == REFUSED

    engine.refuse_update = refuse
    losses, refused, same = [], [], []
    for step in range(STEPS):
        before = snapshot(engine)
        loss, norm = engine.train_step(micro(sizes(True), step, engine.mesh, 2))
        after = snapshot(engine)
        assert (loss, norm) == asked[-1], (loss, norm, asked[-1])
        losses.append(loss)
        refused.append(engine.step_refused)
        same.append(len(before) == len(after) and all(map(torch.equal, before, after)))
    steps = engine.steps
    engine.engine.destroy()
    other = build_engine(layout, bf16, profile)
    kept = [step for step in range(STEPS) if step != REFUSED]
    undisturbed = [other.train_step(micro(sizes(True), step, other.mesh, 2))[0] for step in kept]
    other.engine.destroy()
    results: list = [None] * dist.get_world_size()
    dist.all_gather_object(results, (refused, same))
    return {"losses": losses, "undisturbed": undisturbed, "ranks": results, "steps": steps}


def estimate_updates(layout: dict, **changes) -> list[tuple[float, float]]:
    """Returns (estimated, true) ratios of the updates of single steps, each measured right before."""
    engine = build_engine(layout, decay=0.0, **changes)
    section = engine.section
    pairs = []
    for step in range(STEPS):
        size = UpdateSize(engine.engine.optimizer, engine.lr_scales, section.eps, section.betas, {})
        before = [flat.detach().clone() for _, flat in size._masters()]
        _, norm = engine.train_step(micro(sizes(True), step, engine.mesh, 2))
        totals = torch.zeros(2, dtype=torch.float64)
        for old, (_, new) in zip(before, size._masters(), strict=True):
            totals += torch.stack([(new - old).double().square().sum(), old.double().square().sum()])
        dist.all_reduce(totals)
        pairs.append((size.estimate(section.lr, norm, section.clip), float((totals[0] / totals[1]).sqrt())))
    engine.engine.destroy()
    return pairs

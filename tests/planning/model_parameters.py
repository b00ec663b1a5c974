"""Counts the parameters of the real model on each rank, for comparison with the plan's count."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from tests.models.full.pretrain_cases import sizes


def count_parameters(family: str, tied: bool, layout: dict[str, int]) -> list[tuple[int, int]]:
    """Returns (pipeline stage, number of parameters) of every rank."""
    mesh = meshes.build_mesh(layout.get("tp", 1), layout.get("pp", 1))
    model = build_model(sizes(tied, family), BuildOptions(torch.float32, mesh.tp), mesh)
    own = (mesh.pp_rank, sum(parameter.numel() for parameter in model.parameters()))
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    return ranks

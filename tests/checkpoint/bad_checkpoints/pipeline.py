"""Damaged or hostile checkpoints of a DeepSpeed pipeline (TP 2, PP 2; two layers, untied)."""

from __future__ import annotations

import shutil

import torch

from tests.checkpoint.bad_checkpoints import Builder, exactly, problem, register
from tests.checkpoint.bad_checkpoints.deepspeed import TAG, edit
from tests.checkpoint.bad_checkpoints.universal import Evil

LAYER = "layer_02-model_01-model_states.pt"
pipeline: dict[str, Builder] = {}


@register(pipeline)
def missing_layers(folder):
    for name in (LAYER, "layer_00-model_00-model_states.pt"):
        (folder / TAG / name).unlink()
    return exactly(problem(where=LAYER), problem(where="layer_00-model_00"))


@register(pipeline)
def unexpected_layer(folder):
    for rank in (0, 1):
        shutil.copy(folder / TAG / LAYER, folder / TAG / f"layer_05-model_{rank:02d}-model_states.pt")
    return problem(where="layers of the pipeline", expected="4", found="5")


@register(pipeline)
def layer_number_of_a_billion(folder):
    shutil.copy(folder / TAG / LAYER, folder / TAG / "layer_999999999-model_00-model_states.pt")
    return problem(where="layers of the pipeline", found="999999999")


@register(pipeline)
def layer_of_a_third_rank(folder):
    shutil.copy(folder / TAG / LAYER, folder / TAG / "layer_02-model_02-model_states.pt")
    return problem(where="model-parallel ranks", expected="3", found="4") + problem(where="layer_00-model_02")


@register(pipeline)
def code_in_layer(folder):
    edit(folder, LAYER, lambda state: state.update(more=Evil()))
    return problem(where=LAYER, found="exec")


@register(pipeline)
def truncated_layer(folder):
    path = folder / TAG / LAYER
    path.write_bytes(path.read_bytes()[:-400])
    return problem(where=LAYER)


@register(pipeline)
def layer_of_other_tensors(folder):
    edit(folder, LAYER, lambda state: state.update({"mlp.linear_fc1.weight": torch.ones(3, 48), "bias": torch.ones(2)}))
    return problem(where="decoder.layers.1.mlp.linear_fc1.weight (rank 1 of 2)", found="(3, 48)") + problem(
        where="decoder.layers.1.bias"
    )


@register(pipeline)
def norm_of_another_name(folder):
    edit(folder, "layer_03-model_00-model_states.pt", lambda state: state.update({"weight": state.pop("norm.weight")}))
    return problem(where="weight (layer_03-model_00-model_states.pt)", expected="norm.")


@register(pipeline)
def missing_stage(folder):
    (folder / TAG / "mp_rank_03_model_states.pt").unlink()
    return problem(where="module states", found="missing: mp_rank_03")


@register(pipeline)
def replicas_that_differ(folder):
    edit(folder, "layer_03-model_01-model_states.pt", lambda state: state["norm.weight"].mul_(2))
    return problem(where="final_norm", expected="rank 0", found="rank 1")

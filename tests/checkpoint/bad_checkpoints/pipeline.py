"""DeepSpeed pipeline checkpoints (TP 2, PP 2; two layers, untied) that are damaged or hostile."""

from __future__ import annotations

import shutil

import torch

from tests.checkpoint.bad_checkpoints import Builder, of
from tests.checkpoint.bad_checkpoints.deepspeed import TAG, edit
from tests.checkpoint.bad_checkpoints.universal import Evil

LAYER = "layer_02-model_01-model_states.pt"
pipeline: dict[str, Builder] = {}


@of(pipeline)
def layers_are_missing(folder):
    for name in (LAYER, "layer_00-model_00-model_states.pt"):
        (folder / TAG / name).unlink()
    return LAYER, "layer_00-model_00", "2 faults"


@of(pipeline)
def a_layer_too_many(folder):
    for rank in (0, 1):
        shutil.copy(folder / TAG / LAYER, folder / TAG / f"layer_05-model_{rank:02d}-model_states.pt")
    return "layers of the pipeline", "numbers up to 4", "2 of the transformer's", "found number 5"


@of(pipeline)
def a_layer_of_a_billion(folder):
    shutil.copy(folder / TAG / LAYER, folder / TAG / "layer_999999999-model_00-model_states.pt")
    return ("layers of the pipeline",)


@of(pipeline)
def a_layer_of_a_third_rank(folder):
    shutil.copy(folder / TAG / LAYER, folder / TAG / "layer_02-model_02-model_states.pt")
    return "a multiple of the layers' 3 ranks", "layer_00-model_02"


@of(pipeline)
def a_layer_that_runs_code(folder):
    edit(folder, LAYER, lambda state: state.update(more=Evil()))
    return LAYER, "could run code"


@of(pipeline)
def a_layer_cut_off(folder):
    path = folder / TAG / LAYER
    path.write_bytes(path.read_bytes()[:-400])
    return (LAYER,)


@of(pipeline)
def a_layer_of_other_tensors(folder):
    edit(folder, LAYER, lambda state: state.update({"mlp.linear_fc1.weight": torch.ones(3, 48), "bias": torch.ones(2)}))
    return "decoder.layers.1.mlp.linear_fc1.weight (rank 1 of 2)", "(3, 48)", "decoder.layers.1.bias"


@of(pipeline)
def a_norm_of_another_name(folder):
    edit(folder, "layer_03-model_00-model_states.pt", lambda state: state.update({"weight": state.pop("norm.weight")}))
    return "weight (layer_03-model_00-model_states.pt)", "begins with norm."


@of(pipeline)
def a_stage_is_missing(folder):
    (folder / TAG / "mp_rank_03_model_states.pt").unlink()
    return ("missing: mp_rank_03",)


@of(pipeline)
def replicas_that_differ(folder):
    edit(folder, "layer_03-model_01-model_states.pt", lambda state: state["norm.weight"].mul_(2))
    return "final_norm", "the bits of rank 0"

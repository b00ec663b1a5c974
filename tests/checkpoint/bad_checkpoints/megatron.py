"""Megatron-LM's checkpoints by rank (TP 2, PP 2, tied) that are damaged or hostile."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, register
from tests.checkpoint.bad_checkpoints.universal import Evil

megatron: dict[str, Builder] = {}
adam_state: dict[str, Builder] = {}
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
WORDS = "embedding.word_embeddings.weight"


def file(folder: Path, rank: int = 1, stage: int = 1) -> Path:
    return folder / "release" / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"


def edit(path: Path, change: Callable[[dict], object]) -> None:
    # A copy: what is mapped must not be written.
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@register(megatron)
def a_rank_is_missing(folder):
    shutil.rmtree(file(folder, 0, 1).parent)
    return "mp_rank_00_001", "nothing there"


@register(megatron)
def a_rank_too_many(folder):
    shutil.copytree(file(folder).parent, file(folder, 2, 0).parent)
    return "mp_rank_02_001", "nothing there"


@register(megatron)
def a_stage_too_many(folder):
    for rank in (0, 1):
        shutil.copytree(file(folder, rank, 1).parent, file(folder, rank, 2).parent)
    return NORM, "one stage that holds it"


@register(megatron)
def a_rank_of_no_number(folder):
    shutil.copytree(file(folder).parent, folder / "release" / "mp_rank_00_000_000")
    return "mp_rank_00_000_000", "mp_rank_TT_PPP"


@register(megatron)
def a_rank_twice(folder):
    shutil.copytree(file(folder).parent, folder / "release" / "mp_rank_01")
    return "mp_rank_01", "one folder for a rank"


@register(megatron)
def ten_thousand_ranks(folder):
    shutil.copytree(file(folder).parent, folder / "release" / "mp_rank_9999_99999")
    return "ranks", "as their names say"


@register(megatron)
def a_file_cut_off(folder):
    path = file(folder)
    path.write_bytes(path.read_bytes()[:-300])
    return "mp_rank_01_001", "whole file of torch.save"


@register(megatron)
def a_file_that_runs_code(folder):
    edit(file(folder), lambda state: state.update(args=Evil()))
    return "mp_rank_01_001", "exec", "could run code"


@register(megatron)
def arguments_of_unknown_kinds(folder):
    edit(file(folder), lambda state: state.update(args=argparse.Namespace(share=Fraction(1, 3))))
    return "fractions.Fraction", "could run code"


@register(megatron)
def a_file_of_no_dict(folder):
    torch.save([1, 2], file(folder))
    return "mp_rank_01_001", "checkpoint_version"


@register(megatron)
def an_old_order_of_query_key_and_value(folder):
    edit(file(folder), lambda state: state.update(checkpoint_version=1.0))
    return "checkpoint_version", "1.0"


@register(megatron)
def an_interleaved_pipeline(folder):
    edit(file(folder), lambda state: state.update(model0=state.pop("model")))
    return "mp_rank_01_001", "interleaved"


@register(megatron)
def an_iteration_of_no_number(folder):
    edit(file(folder, 0, 0), lambda state: state.update(iteration=-3))
    return "iteration", "-3"


@register(megatron)
def norms_that_differ(folder):
    edit(file(folder), lambda state: state["model"][NORM].add_(1e-3))
    return "final_norm", "rank 1"


@register(megatron)
def a_copy_of_the_embedding_that_differs(folder):
    edit(file(folder, 0, 1), lambda state: state["model"]["output_layer.weight"][3].mul_(2))
    return WORDS, "rank 0", "last stage"


@register(megatron)
def a_tensor_of_another_shape(folder):
    edit(file(folder), lambda state: state["model"].update({FC1: torch.ones(52, 47)}))
    return "decoder.layers.1.mlp.linear_fc1.weight", "(52, 48)", "(52, 47)"


@register(megatron)
def a_tensor_of_another_dtype(folder):
    edit(file(folder), lambda state: state["model"].update({FC1: state["model"][FC1].bfloat16()}))
    return "decoder.layers.1.mlp.linear_fc1.weight", "one dtype"


@register(megatron)
def a_tensor_of_integers(folder):
    for rank in (0, 1):
        edit(file(folder, rank, 1), lambda state: state["model"].update({NORM: torch.ones(48, dtype=torch.int64)}))
    return NORM, "torch.int64"


@register(megatron)
def a_number_for_a_tensor(folder):
    edit(file(folder), lambda state: state["model"].update({FC1: 3.0}))
    return FC1, "float"


@register(megatron)
def a_tensor_is_missing_on_a_rank(folder):
    edit(file(folder), lambda state: state["model"].pop(FC1))
    return FC1, "a tensor on every rank"


@register(megatron)
def a_tensor_is_missing(folder):
    for rank in (0, 1):
        edit(file(folder, rank, 1), lambda state: state["model"].pop(FC1))
    return ("decoder.layers.1.mlp.linear_fc1.weight",)


@register(megatron)
def a_tensor_too_many(folder):
    for rank in (0, 1):
        edit(file(folder, rank, 0), lambda state: state["model"].update({"decoder.router.weight": torch.ones(2, 2)}))
    return "decoder.router.weight", "no such tensor"


@register(megatron)
def two_names_of_one_tensor(folder):
    name = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    edit(file(folder), lambda state: state["model"].update({name: torch.ones(48)}))
    return "layer_norm_weight", "one tensor of that name"


@register(megatron)
def layers_with_a_gap(folder):
    def renumber(state):
        state["model"] = {name.replace("layers.0.", "layers.1."): value for name, value in state["model"].items()}

    for rank in (0, 1):
        edit(file(folder, rank, 1), renumber)
    return "stage 1", "layers 0 to 0"


@register(megatron)
def a_vocabulary_too_small(folder):
    for rank in (0, 1):
        edit(file(folder, rank, 0), lambda state: state["model"].update({WORDS: torch.ones(8, 48)}))
        edit(file(folder, rank, 1), lambda state: state["model"].update({"output_layer.weight": torch.ones(8, 48)}))
    return "vocabulary", "37", "16"


@register(megatron)
def sizes_of_another_model(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_layers = 7

    edit(file(folder, 0, 0), change)
    return "num_layers", "7"


@register(megatron)
def sizes_of_no_model(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_experts = 8
        state["args"].rotary_base = None

    edit(file(folder, 0, 0), change)
    return "num_experts", "rotary_base", "config.json"


@register(megatron)
def sizes_that_nothing_divides(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_attention_heads = 0
        state["args"].kv_channels = None

    edit(file(folder, 0, 0), change)
    return "args in", "the sizes of a model"


@register(megatron)
def a_tracker_that_leads_elsewhere(folder):
    (folder / "release").rename(folder.parent / "elsewhere")
    (folder / "release").symlink_to("../elsewhere")
    return "release: expected a file or folder inside, found a link to", "lead out"


def edit_adam(path: Path, change: Callable[[dict], object]) -> None:
    """Changes what Adam keeps of fp32 weights, and of 16-bit ones."""

    def both(state):
        for optimizer in (state["optimizer"], state["optimizer"]["optimizer"]):
            change(optimizer)

    edit(path, both)


@register(adam_state)
def a_rank_without_its_optimizer(folder):
    edit(file(folder), lambda state: state.pop("optimizer"))
    return "moments", "all ranks', or none", "mp_rank_01_001"


@register(adam_state)
def steps_of_all_kinds(folder):
    def change(adam):
        steps = ["7", float("nan"), -1.0, 1.5, None, torch.ones(2)]
        for number, step in enumerate(steps):
            adam["state"][number]["step"] = step
        for group in adam["param_groups"]:
            group.pop("step")

    edit_adam(file(folder), change)
    return "6 problems", "count of steps", "'7'", "nan", "-1.0", "1.5", "none", "tensor([1., 1.])"


@register(adam_state)
def ranks_that_count_otherwise(folder):
    def change(adam):
        for state in adam["state"].values():
            state["step"] = torch.tensor(8.0)

    edit_adam(file(folder), change)
    return "one count of Adam's steps on all ranks", "[7, 8]"


@register(adam_state)
def moments_of_other_shapes(folder):
    def change(adam):
        adam["state"][1]["exp_avg"] = torch.ones(3, 5)
        adam["state"][2]["exp_avg_sq"] = adam["state"][2]["exp_avg_sq"].bfloat16()
        adam["state"][3]["exp_avg"] = "x"
        adam["state"][4].pop("exp_avg")

    edit_adam(file(folder), change)
    return "4 problems", "(3, 5)", "torch.bfloat16", "found str", "found none", "mp_rank_01_001"


@register(adam_state)
def a_state_that_is_missing(folder):
    edit_adam(file(folder), lambda adam: adam["state"].pop(2))
    return "exp_avg of", "exp_avg_sq of", "found none"


@register(adam_state)
def a_number_twice(folder):
    edit_adam(file(folder), lambda adam: adam["param_groups"][0].update(params=[0] * 5))
    return "params of the groups", "once"


@register(adam_state)
def masters_too_few(folder):
    edit(file(folder), lambda state: state["optimizer"]["fp32_from_fp16_params"][0].pop())
    return "masters of group 0", "found 4"


@register(adam_state)
def masters_of_another_shape(folder):
    edit(file(folder), lambda state: state["optimizer"]["fp32_from_fp16_params"][1].__setitem__(0, torch.ones(9)))
    return "masters of group 1", "(9,)"


@register(adam_state)
def moments_that_differ_between_ranks(folder):
    def change(adam):
        (vectors,) = (group["params"] for group in adam["param_groups"] if not group["wd_mult"])
        adam["state"][vectors[0]]["exp_avg"].add_(1)

    edit_adam(file(folder), change)
    return "layers.1.norm1", "rank 1"


def set_moments_not_finite(folder) -> tuple[str, ...]:
    def change(adam):
        adam["state"][1]["exp_avg"][0, 0] = float("nan")
        adam["state"][2]["exp_avg_sq"][0, 0] = float("inf")

    edit_adam(file(folder), change)
    return "2 problems", "(exp_avg): expected finite numbers, found 1 NaN", "(exp_avg_sq)", "1 Inf"

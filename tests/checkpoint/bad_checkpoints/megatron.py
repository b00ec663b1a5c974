"""Damaged or hostile checkpoints of Megatron-LM by rank (TP 2, PP 2; two layers, tied)."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, exactly, problem, register
from tests.checkpoint.bad_checkpoints.universal import Evil

megatron: dict[str, Builder] = {}
adam_state: dict[str, Builder] = {}
# On the second stage, and in the model.
FC1, GLOBAL_FC1 = "decoder.layers.0.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def rank_file(folder: Path, tp_rank: int = 1, stage: int = 1) -> Path:
    return folder / "release" / f"mp_rank_{tp_rank:02d}_{stage:03d}" / "model_optim_rng.pt"


def edit(path: Path, change: Callable[[dict], object]) -> None:
    # Loaded as a copy: a memory-mapped file must not be overwritten.
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@register(megatron)
def missing_rank(folder):
    shutil.rmtree(rank_file(folder, 0, 1).parent)
    return problem(where="mp_rank_00_001")


@register(megatron)
def rank_of_one_stage_only(folder):
    shutil.copytree(rank_file(folder).parent, rank_file(folder, 2, 0).parent)
    return problem(where="mp_rank_02_001")


@register(megatron)
def unexpected_stage(folder):
    for rank in (0, 1):
        shutil.copytree(rank_file(folder, rank, 1).parent, rank_file(folder, rank, 2).parent)
    return problem(where=f"{NORM} (stage 2)", expected="one stage", found="two")


@register(megatron)
def malformed_rank_folder(folder):
    shutil.copytree(rank_file(folder).parent, folder / "release" / "mp_rank_00_000_000_0")
    return problem(where="mp_rank_00_000_000_0", expected="mp_rank_TT_PPP_EEE")


@register(megatron)
def two_folders_of_one_rank(folder):
    shutil.copytree(rank_file(folder).parent, folder / "release" / "mp_rank_01")
    return problem(where="mp_rank_01_000", found="mp_rank_01 ")


@register(megatron)
def ten_thousand_ranks(folder):
    shutil.copytree(rank_file(folder).parent, folder / "release" / "mp_rank_9999_99999")
    return problem(where="ranks", expected="10000 x 100000", found="5")


@register(megatron)
def truncated_file(folder):
    path = rank_file(folder)
    path.write_bytes(path.read_bytes()[:-300])
    return problem(where="mp_rank_01_001", expected="torch.save")


@register(megatron)
def code_in_file(folder):
    edit(rank_file(folder), lambda state: state.update(args=Evil()))
    return problem(where="mp_rank_01_001", found="exec")


@register(megatron)
def arguments_of_unknown_classes(folder):
    edit(rank_file(folder), lambda state: state.update(args=argparse.Namespace(share=Fraction(1, 3))))
    return problem(where="mp_rank_01_001", found="fractions.Fraction")


@register(megatron)
def file_that_is_a_list(folder):
    torch.save([1, 2], rank_file(folder))
    return problem(where="mp_rank_01_001", expected="checkpoint_version", found="None")


@register(megatron)
def version_with_another_qkv_order(folder):
    edit(rank_file(folder), lambda state: state.update(checkpoint_version=1.0))
    return problem(where="mp_rank_01_001", expected="checkpoint_version", found="1.0")


@register(megatron)
def interleaved_pipeline(folder):
    edit(rank_file(folder), lambda state: state.update(model0=state.pop("model")))
    return problem(where="mp_rank_01_001", expected="model", found="model0")


@register(megatron)
def negative_iteration(folder):
    edit(rank_file(folder, 0, 0), lambda state: state.update(iteration=-3))
    return problem(where="iteration", found="-3")


@register(megatron)
def replicas_that_differ(folder):
    edit(rank_file(folder), lambda state: state["model"][NORM].add_(1e-3))
    return problem(where="final_norm", expected="rank 0", found="rank 1")


@register(megatron)
def tied_copy_that_differs(folder):
    edit(rank_file(folder, 0, 1), lambda state: state["model"]["output_layer.weight"][3].mul_(2))
    return problem(where=f"{EMBEDDING} (weight, {folder / 'release'}, rank 0)", expected="last stage")


@register(megatron)
def tensor_of_another_shape(folder):
    edit(rank_file(folder), lambda state: state["model"].update({FC1: torch.ones(52, 47)}))
    return problem(where=f"{GLOBAL_FC1} (rank 1)", expected="(52, 48)", found="(52, 47)")


@register(megatron)
def tensor_of_another_dtype(folder):
    edit(rank_file(folder), lambda state: state["model"].update({FC1: state["model"][FC1].bfloat16()}))
    return problem(where=f"{GLOBAL_FC1} (rank 1)", expected="one floating-point dtype", found="torch.bfloat16")


@register(megatron)
def tensor_of_integers(folder):
    for rank in (0, 1):
        edit(rank_file(folder, rank, 1), lambda state: state["model"].update({NORM: torch.ones(48, dtype=torch.int64)}))
    return problem(where=f"{NORM} (rank 0)", found="torch.int64")


@register(megatron)
def number_instead_of_a_tensor(folder):
    edit(rank_file(folder), lambda state: state["model"].update({FC1: 3.0}))
    return problem(where=FC1, expected="tensor", found="float")


@register(megatron)
def missing_tensor_on_one_rank(folder):
    edit(rank_file(folder), lambda state: state["model"].pop(FC1))
    return problem(where=f"{FC1} (stage 1)", found="[1]")


@register(megatron)
def missing_tensor(folder):
    for rank in (0, 1):
        edit(rank_file(folder, rank, 1), lambda state: state["model"].pop(FC1))
    return problem(where=GLOBAL_FC1, found="none")


@register(megatron)
def unexpected_tensor(folder):
    for rank in (0, 1):
        edit(
            rank_file(folder, rank, 0), lambda state: state["model"].update({"decoder.router.weight": torch.ones(2, 2)})
        )
    return problem(where="decoder.router.weight", found="(2, 2)")


@register(megatron)
def two_names_of_one_tensor(folder):
    name = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    edit(rank_file(folder), lambda state: state["model"].update({name: torch.ones(48)}))
    return problem(where="layer_norm_weight", expected="one tensor", found="two")


@register(megatron)
def gap_in_layer_numbers(folder):
    def renumber(state):
        state["model"] = {name.replace("layers.0.", "layers.1."): value for name, value in state["model"].items()}

    for rank in (0, 1):
        edit(rank_file(folder, rank, 1), renumber)
    return problem(where="stage 1", expected="layers 0 to 0", found="[1]")


@register(megatron)
def vocabulary_too_small(folder):
    for rank in (0, 1):
        edit(rank_file(folder, rank, 0), lambda state: state["model"].update({EMBEDDING: torch.ones(8, 48)}))
        edit(
            rank_file(folder, rank, 1), lambda state: state["model"].update({"output_layer.weight": torch.ones(8, 48)})
        )
    return problem(where="vocabulary", expected="37", found="16")


@register(megatron)
def arguments_of_another_model(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_layers = 7

    edit(rank_file(folder, 0, 0), change)
    return problem(where="num_layers", expected="7", found="2")


@register(megatron)
def arguments_of_no_llama(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_experts = 8
        state["args"].rotary_base = None

    edit(rank_file(folder, 0, 0), change)
    return problem(where="moe_router_topk", found="none") + problem(where="rotary_base", found="none")


@register(megatron)
def arguments_with_zero_heads(folder):
    (folder / "dims.json").unlink()

    def change(state):
        state["args"].num_attention_heads = 0
        state["args"].kv_channels = None

    edit(rank_file(folder, 0, 0), change)
    return problem(where="num_attention_heads", expected="positive integers", found="48, 0")


@register(megatron)
def tracker_to_a_link(folder):
    (folder / "release").rename(folder.parent / "elsewhere")
    (folder / "release").symlink_to("../elsewhere")
    return problem(where="release", found="link")


def edit_adam(path: Path, change: Callable[[dict], object]) -> None:
    """Changes the optimizer state of fp32 weights, and the inner one of 16-bit weights."""

    def both(state):
        for optimizer in (state["optimizer"], state["optimizer"]["optimizer"]):
            change(optimizer)

    edit(path, both)


@register(adam_state)
def rank_without_optimizer(folder):
    edit(rank_file(folder), lambda state: state.pop("optimizer"))
    return problem(where="moments", found="mp_rank_01_001")


@register(adam_state)
def invalid_step_counts(folder):
    def change(adam):
        steps = ["7", float("nan"), -1.0, 1.5, None, torch.ones(2)]
        for number, step in enumerate(steps):
            adam["state"][number]["step"] = step
        for group in adam["param_groups"]:
            group.pop("step")

    edit_adam(rank_file(folder), change)
    return exactly(
        *(
            problem(where="step of", expected="step count", found=found)
            for found in ("'7'", "nan", "-1.0", "1.5", "none", "tensor([1., 1.])")
        )
    )


@register(adam_state)
def step_counts_that_differ_between_ranks(folder):
    def change(adam):
        for state in adam["state"].values():
            state["step"] = torch.tensor(8.0)

    edit_adam(rank_file(folder), change)
    return problem(where="step", expected="step count on all ranks", found="[7, 8]")


@register(adam_state)
def invalid_moments(folder):
    def change(adam):
        adam["state"][1]["exp_avg"] = torch.ones(3, 5)
        adam["state"][2]["exp_avg_sq"] = adam["state"][2]["exp_avg_sq"].bfloat16()
        adam["state"][3]["exp_avg"] = "x"
        adam["state"][4].pop("exp_avg")

    edit_adam(rank_file(folder), change)
    return exactly(
        problem(where="mp_rank_01_001", found="(3, 5)"),
        problem(where="mp_rank_01_001", found="torch.bfloat16"),
        problem(where="mp_rank_01_001", found="str"),
        problem(where="mp_rank_01_001", found="none"),
    )


@register(adam_state)
def missing_parameter_state(folder):
    edit_adam(rank_file(folder), lambda adam: adam["state"].pop(2))
    return problem(where="exp_avg of", found="none") + problem(where="exp_avg_sq of", found="none")


@register(adam_state)
def duplicate_parameter_number(folder):
    edit_adam(rank_file(folder), lambda adam: adam["param_groups"][0].update(params=[0] * 5))
    return problem(where="params of", expected="once", found="duplicates")


@register(adam_state)
def missing_master_weights(folder):
    edit(rank_file(folder), lambda state: state["optimizer"]["fp32_from_fp16_params"][0].pop())
    return problem(where="master weights of group 0", found="4")


@register(adam_state)
def master_weights_of_another_shape(folder):
    edit(rank_file(folder), lambda state: state["optimizer"]["fp32_from_fp16_params"][1].__setitem__(0, torch.ones(9)))
    return problem(where="master weights of group 1", found="(9,)")


@register(adam_state)
def moments_that_differ_between_ranks(folder):
    def change(adam):
        (vectors,) = (group["params"] for group in adam["param_groups"] if not group["wd_mult"])
        adam["state"][vectors[0]]["exp_avg"].add_(1)

    edit_adam(rank_file(folder), change)
    return problem(where="layers.1.norm1", expected="rank 0", found="rank 1")


def set_moments_not_finite(folder) -> tuple:
    def change(adam):
        adam["state"][1]["exp_avg"][0, 0] = float("nan")
        adam["state"][2]["exp_avg_sq"][0, 0] = float("inf")

    edit_adam(rank_file(folder), change)
    return exactly(
        problem(where="(exp_avg)", expected="finite", found="1 NaN"),
        problem(where="(exp_avg_sq)", expected="finite", found="1 Inf"),
    )

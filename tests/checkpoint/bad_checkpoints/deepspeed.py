"""Damaged or hostile checkpoints of a DeepSpeed engine (TP 2, DP 2, from testing/fuzz/engine_samples.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, exactly, problem, register
from tests.checkpoint.bad_checkpoints.universal import Evil

TAG = "global_step0"
MODEL_STATES, OPTIM_STATES = "mp_rank_01_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
ZERO3_MODEL_STATES = "zero_pp_rank_0_mp_rank_00_model_states.pt"
NORM, QKV = "decoder.final_layernorm.weight", "decoder.layers.1.self_attention.linear_qkv.weight"
zero1: dict[str, Builder] = {}
zero3: dict[str, Builder] = {}


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    path = folder / TAG / name
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def edit_optimizer(folder: Path, change: Callable[[dict], object]) -> None:
    edit(folder, OPTIM_STATES, lambda state: change(state["optimizer_state_dict"]))


@register(zero1)
def missing_ranks(folder):
    for name in (MODEL_STATES, OPTIM_STATES):
        (folder / TAG / name).unlink()
    return exactly(
        problem(where="module states", found="missing: mp_rank_01"),
        problem(where="optimizer states", found="missing: zero_pp_rank_1_mp_rank_00"),
    )


@register(zero1)
def unexpected_ranks(folder):
    shutil.copy(folder / TAG / MODEL_STATES, folder / TAG / "mp_rank_02_model_states.pt")
    shutil.copy(folder / TAG / OPTIM_STATES, folder / TAG / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    return exactly(
        problem(where="module states", found="unexpected: mp_rank_02"),
        problem(where="optimizer states", found="unexpected: zero_pp_rank_2_mp_rank_00"),
    )


@register(zero1)
def rank_in_two_precisions(folder):
    shutil.copy(folder / TAG / OPTIM_STATES, folder / TAG / f"bf16_{OPTIM_STATES}")
    return problem(where=OPTIM_STATES, found=f"bf16_{OPTIM_STATES}")


@register(zero1)
def world_size_of_a_billion(folder):
    edit(folder, "mp_rank_00_model_states.pt", lambda state: state.update(mp_world_size=10**9))
    return problem(where="mp_world_size", found="1000000000")


@register(zero1)
def truncated_files(folder):
    for name in (MODEL_STATES, OPTIM_STATES):
        path = folder / TAG / name
        path.write_bytes(path.read_bytes()[:-400])
    return exactly(problem(where=MODEL_STATES), problem(where=OPTIM_STATES))


@register(zero1)
def code_in_module_states(folder):
    edit(folder, MODEL_STATES, lambda state: state["module"].update({NORM: Evil()}))
    return problem(where=MODEL_STATES, found="exec")


@register(zero1)
def code_in_optimizer_states(folder):
    edit_optimizer(folder, lambda state: state.update(overflow=Evil()))
    return problem(where=OPTIM_STATES, found="exec")


@register(zero1)
def file_that_is_a_list(folder):
    torch.save([1, 2], folder / TAG / MODEL_STATES)
    return problem(where=MODEL_STATES, expected="dict", found="list")


@register(zero1)
def tensors_of_another_model(folder):
    def change(state):
        module = state["module"]
        module[NORM] = torch.ones(47)
        module["decoder.layers.7.extra"] = torch.ones(1)
        state["param_shapes"] = []

    edit(folder, MODEL_STATES, change)
    return problem(where=f"{NORM} (rank 1 of 2)", expected="(48,)", found="(47,)") + problem(
        where="decoder.layers.7.extra (rank 1 of 2)", found="(1,)"
    )


@register(zero1)
def module_that_is_a_list(folder):
    edit(folder, MODEL_STATES, lambda state: state.update(module=[3.0], param_shapes="all"))
    return problem(where="rank 1 of 2", expected="param_shapes", found="str") + problem(
        where="rank 1 of 2", expected="state dict", found="list"
    )


@register(zero1)
def fragment_beyond_the_partition(folder):
    def change(state):
        next(iter(state["param_slice_mappings"][0].values())).start = 10**9

    edit_optimizer(folder, change)
    return problem(where="data-parallel rank 1", found="1000000000")


@register(zero1)
def fragment_without_address(folder):
    def change(state):
        state["param_slice_mappings"][1][NORM] = "everything"

    edit_optimizer(folder, change)
    return problem(where=f"{NORM} (rank 0 of 2, data-parallel rank 1)", found="None")


@register(zero1)
def missing_fragment(folder):
    def change(state):
        del state["param_slice_mappings"][1][QKV]

    edit_optimizer(folder, change)
    return problem(where=f"{QKV} (rank 0 of 2)", expected="2400 elements")


@register(zero1)
def truncated_partition(folder):
    def change(state):
        state["single_partition_of_fp32_groups"][0] = torch.ones(10)

    edit_optimizer(folder, change)
    return problem(where="data-parallel rank 1", expected="partition's 10 elements")


@register(zero1)
def partitions_that_are_a_number(folder):
    edit_optimizer(folder, lambda state: state.update(single_partition_of_fp32_groups=7))
    return problem(where="data-parallel rank 1", expected="single_partition_of_fp32_groups", found="int")


@register(zero1)
def no_slice_mappings(folder):
    edit_optimizer(folder, lambda state: state.pop("param_slice_mappings"))
    return problem(where="data-parallel rank 1", expected="param_slice_mappings", found="NoneType")


@register(zero1)
def moments_on_one_rank_only(folder):
    edit_optimizer(folder, lambda state: state.update(base_optimizer_state={"state": {}}))
    return problem(where="rank 0 of 2", expected="moments on all data-parallel ranks")


@register(zero1)
def moments_too_short(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["exp_avg_sq"] = torch.ones(3)

    edit_optimizer(folder, change)
    return problem(where="exp_avg_sq of group 1", found="(3,)")


@register(zero1)
def two_step_counts(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["step"] = torch.tensor(8.0)

    edit_optimizer(folder, change)
    return problem(where="rank 0 of 2", expected="step count", found="'7', '8'")


@register(zero1)
def step_count_of_infinity(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["step"] = float("inf")

    edit_optimizer(folder, change)
    return problem(where="rank 0 of 2", expected="step count", found="None")


@register(zero1)
def replicas_that_differ(folder):
    def change(state):
        address = state["param_slice_mappings"][0][NORM]
        state["single_partition_of_fp32_groups"][0][address.start] += 1

    edit(folder, "zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda state: change(state["optimizer_state_dict"]))
    return problem(where="final_norm", expected="rank 0", found="rank 1")


@register(zero1)
def checkpoint_of_a_fit(folder):
    edit(folder, "mp_rank_00_model_states.pt", lambda state: state.update(megatron_ligo={"holds": "operator"}))
    return problem(where=TAG, expected="model", found="operator")


@register(zero1)
def tag_outside_the_folder(folder):
    (folder / "latest").write_text("../a")
    return problem(where=f"{folder / 'latest'}", found="../a")


@register(zero1)
def another_vocabulary(folder):
    path = folder / "dims.json"
    path.write_text(path.read_text().replace('"vocab_size": 37', '"vocab_size": 39'))
    return problem(where="embedding.word_embeddings.weight", expected="39 rows", found="38")


@register(zero1)
def a_trillion_layers(folder):
    path = folder / "dims.json"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 1000000000000'))
    return "num_layers", "1000000000000"


@register(zero3)
def no_optimizer_states(folder):
    for path in (folder / TAG).glob("*optim_states.pt"):
        path.unlink()
    return problem(where="optimizer states", found="missing: zero_pp_rank_0_mp_rank_00")


@register(zero3)
def missing_module_states(folder):
    (folder / TAG / "zero_pp_rank_1_mp_rank_01_model_states.pt").unlink()
    return problem(where="module states", found="missing: zero_pp_rank_1_mp_rank_01")


@register(zero3)
def module_states_of_two_zero_stages(folder):
    shutil.copy(folder / TAG / ZERO3_MODEL_STATES, folder / TAG / "mp_rank_00_model_states.pt")
    return problem(where=TAG, expected="ZeRO 3 or", found="both")


@register(zero3)
def frozen_parameter(folder):
    for dp_rank in (0, 1):
        for mp_rank in (0, 1):
            name = f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_model_states.pt"
            edit(folder, name, lambda state: state["param_shapes"][0].pop(NORM))
    return problem(where=NORM, found="nothing")


@register(zero3)
def fewer_groups_than_in_param_shapes(folder):
    edit_optimizer(folder, lambda state: state["fp32_flat_groups"].pop())
    return problem(where="data-parallel rank 1", expected="2 flat groups", found="1")


@register(zero3)
def negative_shape(folder):
    edit(folder, ZERO3_MODEL_STATES, lambda state: state["param_shapes"][0].update({NORM: (-48,)}))
    return problem(where="rank 0 of 2", expected="param_shapes")


@register(zero3)
def shape_beyond_the_partition(folder):
    edit(folder, ZERO3_MODEL_STATES, lambda state: state["param_shapes"][0].update({NORM: torch.Size([10**9])}))
    return problem(where=NORM, expected="3864 elements", found="500000000")


@register(zero1)
def fragments_on_the_same_numbers(folder):
    def change(state):
        addresses = list(state["param_slice_mappings"][0].values())
        addresses[1].start = addresses[0].start

    edit_optimizer(folder, change)
    return problem(where="data-parallel rank 1", expected="numbers of its own", found="those of")


@register(zero1)
def moments_on_the_same_numbers(folder):
    def change(state):
        moments = state["base_optimizer_state"]["state"][0]
        moments["exp_avg_sq"] = moments["exp_avg"]

    edit_optimizer(folder, change)
    return problem(where="exp_avg_sq of group 0", expected="numbers of its own", found="exp_avg of group 0")


@register(zero1)
def two_parameters_on_the_same_numbers(folder):
    first = QKV.replace("layers.1", "layers.0")
    edit(folder, MODEL_STATES, lambda state: state["module"].update({QKV: state["module"][first]}))
    return problem(where=QKV, expected="numbers of its own", found=first)


@register(zero3)
def a_frozen_parameter_in_parts_of_another_length(folder):
    for dp_rank in (0, 1):
        for mp_rank in (0, 1):
            name = f"zero_pp_rank_{dp_rank}_mp_rank_{mp_rank:02d}_model_states.pt"
            parts = {"frozen_param_shapes": {NORM: (48,)}, "frozen_param_fragments": {NORM: torch.ones(24 - dp_rank)}}
            edit(folder, name, lambda state, parts=parts: state.update(parts))
    return problem(where=f"{NORM} (rank 0 of 2), frozen", expected="24 elements on 2")


@register(zero3)
def a_frozen_parameter_on_one_rank_only(folder):
    parts = {"frozen_param_shapes": {NORM: (48,)}, "frozen_param_fragments": {NORM: torch.ones(24)}}
    edit(folder, ZERO3_MODEL_STATES, lambda state: state.update(parts))
    return problem(where="mp_rank_00", expected="frozen_param_fragments on every data-parallel rank")

"""DeepSpeed engine checkpoints (TP 2, DP 2, made by testing/fuzz/engine_samples.py) that are damaged or hostile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, of
from tests.checkpoint.bad_checkpoints.universal import Evil

TAG = "global_step0"
MODEL, OPTIM = "mp_rank_01_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"
NORM, QKV = "decoder.final_layernorm.weight", "decoder.layers.1.self_attention.linear_qkv.weight"
zero1: dict[str, Builder] = {}
zero3: dict[str, Builder] = {}


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    path = folder / TAG / name
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def edit_zero(folder: Path, change: Callable[[dict], object]) -> None:
    edit(folder, OPTIM, lambda state: change(state["optimizer_state_dict"]))


@of(zero1)
def ranks_are_missing(folder):
    for name in (MODEL, OPTIM):
        (folder / TAG / name).unlink()
    return "missing: mp_rank_01", "missing: zero_pp_rank_1_mp_rank_00", "2 faults"


@of(zero1)
def ranks_too_many(folder):
    shutil.copy(folder / TAG / MODEL, folder / TAG / "mp_rank_02_model_states.pt")
    shutil.copy(folder / TAG / OPTIM, folder / TAG / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    return "too many: mp_rank_02", "too many: zero_pp_rank_2_mp_rank_00", "2 faults"


@of(zero1)
def a_rank_in_two_precisions(folder):
    shutil.copy(folder / TAG / OPTIM, folder / TAG / f"bf16_{OPTIM}")
    return "one file for each rank", f"bf16_{OPTIM}"


@of(zero1)
def a_billion_ranks(folder):
    edit(folder, "mp_rank_00_model_states.pt", lambda state: state.update(mp_world_size=10**9))
    return "mp_world_size", "1000000000"


@of(zero1)
def files_cut_off(folder):
    for name in (MODEL, OPTIM):
        path = folder / TAG / name
        path.write_bytes(path.read_bytes()[:-400])
    return MODEL, OPTIM, "2 faults"


@of(zero1)
def a_module_that_runs_code(folder):
    edit(folder, MODEL, lambda state: state["module"].update({NORM: Evil()}))
    return MODEL, "could run code"


@of(zero1)
def optimizer_states_that_run_code(folder):
    edit_zero(folder, lambda state: state.update(overflow=Evil()))
    return OPTIM, "could run code"


@of(zero1)
def a_file_that_is_a_list(folder):
    torch.save([1, 2], folder / TAG / MODEL)
    return MODEL, "a dict", "list"


@of(zero1)
def tensors_of_another_model(folder):
    def change(state):
        module = state["module"]
        module[NORM] = torch.ones(47)
        module["decoder.layers.7.extra"] = torch.ones(1)
        state["param_shapes"] = []

    edit(folder, MODEL, change)
    return f"{NORM} (rank 1 of 2)", "(47,)", "decoder.layers.7.extra"


@of(zero1)
def a_module_of_numbers(folder):
    edit(folder, MODEL, lambda state: state.update(module=[3.0], param_shapes="all"))
    return "rank 1 of 2", "a module's tensors by name", "param_shapes"


@of(zero1)
def a_fragment_beyond_the_end(folder):
    def change(state):
        next(iter(state["param_slice_mappings"][0].values())).start = 10**9

    edit_zero(folder, change)
    return "data-parallel rank 1", "from 1000000000 on"


@of(zero1)
def a_fragment_of_no_numbers(folder):
    def change(state):
        state["param_slice_mappings"][1][NORM] = "everything"

    edit_zero(folder, change)
    return NORM, "None from None on"


@of(zero1)
def a_fragment_is_gone(folder):
    def change(state):
        del state["param_slice_mappings"][1][QKV]

    edit_zero(folder, change)
    return f"{QKV} (rank 0 of 2)", "numbers in ZeRO's flat tensors"


@of(zero1)
def flat_tensors_cut_short(folder):
    def change(state):
        state["single_partition_of_fp32_groups"][0] = torch.ones(10)

    edit_zero(folder, change)
    return "data-parallel rank 1", "a part of the 10 numbers"


@of(zero1)
def flat_tensors_that_are_none(folder):
    edit_zero(folder, lambda state: state.update(single_partition_of_fp32_groups=7))
    return "data-parallel rank 1", "flat tensors by group", "int"


@of(zero1)
def no_mappings(folder):
    edit_zero(folder, lambda state: state.pop("param_slice_mappings"))
    return "data-parallel rank 1", "param_slice_mappings"


@of(zero1)
def moments_of_one_rank_only(folder):
    edit_zero(folder, lambda state: state.update(base_optimizer_state={"state": {}}))
    return "rank 0 of 2", "moments on all data-parallel ranks"


@of(zero1)
def moments_too_short(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["exp_avg_sq"] = torch.ones(3)

    edit_zero(folder, change)
    return "exp_avg_sq of group 1", "(3,)"


@of(zero1)
def two_counts_of_steps(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["step"] = torch.tensor(8.0)

    edit_zero(folder, change)
    return "one count of Adam's steps", "'7', '8'"


@of(zero1)
def steps_that_are_no_count(folder):
    def change(state):
        state["base_optimizer_state"]["state"][1]["step"] = float("inf")

    edit_zero(folder, change)
    return ("one count of Adam's steps",)


@of(zero1)
def replicas_that_differ(folder):
    def change(state):
        address = state["param_slice_mappings"][0][NORM]
        state["single_partition_of_fp32_groups"][0][address.start] += 1

    edit(folder, "zero_pp_rank_0_mp_rank_00_optim_states.pt", lambda state: change(state["optimizer_state_dict"]))
    return "final_norm", "the bits of rank 0"


@of(zero1)
def a_fits_checkpoint(folder):
    edit(folder, "mp_rank_00_model_states.pt", lambda state: state.update(megatron_ligo={"holds": "operator"}))
    return "holds an operator", "tools/grow.py"


@of(zero1)
def a_tag_out_of_the_folder(folder):
    (folder / "latest").write_text("../a")
    return ("latest",)


@of(zero1)
def another_vocabulary(folder):
    path = folder / "dims.json"
    path.write_text(path.read_text().replace('"vocab_size": 37', '"vocab_size": 39'))
    return "embedding.word_embeddings.weight", "39 rows"


@of(zero1)
def a_million_layers(folder):
    path = folder / "dims.json"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 1000000000000'))
    return ("num_layers",)


@of(zero3)
def no_optimizer_states(folder):
    for path in (folder / TAG).glob("*optim_states.pt"):
        path.unlink()
    return "optimizer states", "missing: zero_pp_rank_0_mp_rank_00"


@of(zero3)
def module_states_are_missing(folder):
    (folder / TAG / "zero_pp_rank_1_mp_rank_01_model_states.pt").unlink()
    return "module states", "missing: zero_pp_rank_1_mp_rank_01"


@of(zero3)
def module_states_of_two_stages(folder):
    shutil.copy(folder / TAG / MODEL_3, folder / TAG / "mp_rank_00_model_states.pt")
    return "ZeRO 3 or of another stage", "both"


@of(zero3)
def a_frozen_parameter(folder):
    for rank in (0, 1):
        for mp in (0, 1):
            name = f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_model_states.pt"
            edit(folder, name, lambda state: state["param_shapes"][0].pop(NORM))
    return NORM, "nothing"


@of(zero3)
def fewer_groups_than_shapes(folder):
    edit_zero(folder, lambda state: state["fp32_flat_groups"].pop())
    return "2 flat groups, as param_shapes has", "found 1"


@of(zero3)
def a_shape_that_is_none(folder):
    edit(folder, MODEL_3, lambda state: state["param_shapes"][0].update({NORM: (-48,)}))
    return "rank 0 of 2", "param_shapes"


@of(zero3)
def a_shape_beyond_the_flat_tensor(folder):
    edit(folder, MODEL_3, lambda state: state["param_shapes"][0].update({NORM: torch.Size([10**9])}))
    return NORM, "a part of the"

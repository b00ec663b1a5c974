"""Damaged or hostile universal checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, edit_json, problem, register

universal: dict[str, Builder] = {}


class Evil:
    """Executes code when it is unpickled."""

    ran = False

    def __reduce__(self):
        return exec, ("import tests.checkpoint.bad_checkpoints.universal as b; b.Evil.ran = True",)


def parameter(folder: Path, name: str = "decoder.layers.0.mlp.linear_fc1.weight") -> Path:
    return folder / "global_step0" / "zero" / name


@register(universal)
def missing_parameter(folder):
    for file in parameter(folder).iterdir():
        file.unlink()
    return problem(where="linear_fc1.weight/fp32.pt")


@register(universal)
def unexpected_parameter(folder):
    parameter(folder, "decoder.layers.9.mlp.linear_fc1.weight").mkdir()
    return problem(where="decoder.layers.9.mlp.linear_fc1.weight")


@register(universal)
def parameter_of_another_shape(folder):
    torch.save({"param": torch.ones(3, 48)}, parameter(folder) / "fp32.pt")
    return problem(where="linear_fc1", expected="(104, 48)", found="(3, 48)")


@register(universal)
def parameter_of_integers(folder):
    torch.save({"param": torch.ones(104, 48, dtype=torch.int64)}, parameter(folder) / "fp32.pt")
    return problem(where="linear_fc1", expected="floating-point")


@register(universal)
def truncated_parameter(folder):
    path = parameter(folder) / "fp32.pt"
    path.write_bytes(path.read_bytes()[:-300])
    return problem(where="linear_fc1.weight/fp32.pt")


@register(universal)
def code_in_parameter(folder):
    torch.save({"param": Evil()}, parameter(folder) / "fp32.pt")
    return problem(where="linear_fc1", found="exec")


@register(universal)
def code_in_model_states(folder):
    torch.save(Evil(), folder / "global_step0" / "mp_rank_00_model_states.pt")
    return problem(where="mp_rank_00_model_states.pt", found="exec")


@register(universal)
def incomplete_moments(folder):
    (parameter(folder) / "exp_avg.pt").unlink()
    return problem(where="linear_fc1", expected="moments")


@register(universal)
def tag_outside_the_folder(folder):
    (folder / "latest_universal").write_text("../../a")
    return problem(where="latest_universal", found="../../a")


@register(universal)
def no_model_config(folder):
    (folder / "dims.json").unlink()
    return problem(where=f"{folder}", expected="config.json")


@register(universal)
def config_of_no_model(folder):
    edit_json(folder / "dims.json", dims={"arch": "llama", "hiden_size": 3})
    return "hiden_size", "hidden_size"


@register(universal)
def tag_of_unprintable_bytes(folder):
    (folder / "latest_universal").write_bytes(b"\xff\x00/")
    return problem(where="latest_universal")


@register(universal)
def global_steps_that_are_a_word(folder):
    torch.save({"global_steps": "seven"}, folder / "global_step0" / "mp_rank_00_model_states.pt")
    return problem(expected="global_steps", found="seven")


@register(universal)
def tag_that_is_a_link(folder):
    (folder / "global_step0").rename(folder.parent / "elsewhere")
    (folder / "global_step0").symlink_to("../elsewhere")
    return problem(where="global_step0", found="link")


def set_steps(folder: Path, steps: dict[str, object]) -> None:
    """Adds moments of zeros and these steps to the parameters whose names end so; step 7 to the others."""
    for path in (folder / "global_step0" / "zero").iterdir():
        if path.is_dir():
            value = next((step for name, step in steps.items() if path.name.endswith(name)), 7)
            (path / "step.pt").unlink(missing_ok=True)
            if value is not None:
                torch.save(value, path / "step.pt")


@register(universal)
def steps_that_differ(folder):
    set_steps(folder, {"final_layernorm.weight": torch.tensor(9.0)})
    return problem("zero", "one Adam step", "9 of decoder.final_layernorm.weight") + problem(found="7 of embedding")


@register(universal)
def one_parameter_without_a_step(folder):
    set_steps(folder, {"final_layernorm.weight": None})
    return problem("zero", "one Adam step", "none of decoder.final_layernorm.weight")


@register(universal)
def steps_of_the_optimizer_that_differ(folder):
    set_steps(folder, {"": None})
    path = folder / "global_step0" / "zero" / "optimizer_state.pt"
    state = torch.load(path)
    base = {"state": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}}, "param_groups": [{}]}
    torch.save({**state, "optimizer_state_dict": base}, path)
    return problem("zero", "one Adam step", "3 of param group 0") + problem(found="4 of param group 1")


@register(universal)
def a_step_that_is_no_number(folder):
    set_steps(folder, {"final_layernorm.weight": torch.tensor(1.5)})
    return problem("final_layernorm.weight", "Adam's step count", "1.5")


@register(universal)
def a_bit_of_a_moment(folder):
    path = parameter(folder, "decoder.final_layernorm.weight") / "exp_avg.pt"
    torch.save({"param": torch.full((48,), 0.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((48,), 0.5).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    return problem("exp_avg.pt", found="checksum")


@register(universal)
def parameter_of_expanded_numbers(folder):
    torch.save({"param": torch.ones(1, 1).expand(104, 48)}, parameter(folder) / "fp32.pt")
    return problem("param", "a dense tensor", "share")

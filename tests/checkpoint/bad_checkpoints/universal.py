"""Universal checkpoints that are damaged or hostile."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint.bad_checkpoints import Builder, edit_json, of

MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
universal: dict[str, Builder] = {}


class Evil:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return exec, ("import tests.checkpoint.bad_checkpoints.universal as b; b.Evil.ran = True",)


def parameter(folder: Path, name: str = "decoder.layers.0.mlp.linear_fc1.weight") -> Path:
    return folder / "global_step0" / "zero" / name


@of(universal)
def a_parameter_is_missing(folder):
    for file in parameter(folder).iterdir():
        file.unlink()
    return "linear_fc1", "fp32.pt"


@of(universal)
def a_parameter_too_many(folder):
    parameter(folder, "decoder.layers.9.mlp.linear_fc1.weight").mkdir()
    return ("decoder.layers.9.mlp.linear_fc1.weight",)


@of(universal)
def a_parameter_of_another_shape(folder):
    torch.save({"param": torch.ones(3, 48)}, parameter(folder) / "fp32.pt")
    return "linear_fc1", "(104, 48)", "(3, 48)"


@of(universal)
def a_parameter_of_integers(folder):
    torch.save({"param": torch.ones(104, 48, dtype=torch.int64)}, parameter(folder) / "fp32.pt")
    return ("linear_fc1",)


@of(universal)
def a_parameter_cut_off(folder):
    path = parameter(folder) / "fp32.pt"
    path.write_bytes(path.read_bytes()[:-300])
    return "linear_fc1", "fp32.pt"


@of(universal)
def a_parameter_that_runs_code(folder):
    torch.save({"param": Evil()}, parameter(folder) / "fp32.pt")
    return "linear_fc1", "could run code"


@of(universal)
def metadata_that_runs_code(folder):
    torch.save(Evil(), folder / "global_step0" / "mp_rank_00_model_states.pt")
    return "mp_rank_00_model_states.pt", "could run code"


@of(universal)
def some_moments_only(folder):
    (parameter(folder) / "exp_avg.pt").unlink()
    return "moments", "linear_fc1"


@of(universal)
def a_tag_out_of_the_folder(folder):
    (folder / "latest_universal").write_text("../../a")
    return ("latest_universal",)


@of(universal)
def no_sizes(folder):
    (folder / "dims.json").unlink()
    return ("config.json",)


@of(universal)
def sizes_of_no_model(folder):
    edit_json(folder / "dims.json", model_config={"arch": "llama", "hiden_size": 3})
    return "hiden_size", "hidden_size"


@of(universal)
def a_tag_of_no_letters(folder):
    (folder / "latest_universal").write_bytes(b"\xff\x00/")
    return ("latest_universal",)


@of(universal)
def steps_of_no_number(folder):
    torch.save({"global_steps": "seven"}, folder / "global_step0" / "mp_rank_00_model_states.pt")
    return "global_steps", "seven"


@of(universal)
def a_tag_that_leads_elsewhere(folder):
    (folder / "global_step0").rename(folder.parent / "elsewhere")
    (folder / "global_step0").symlink_to("../elsewhere")
    return "global_step0: expected a file or folder inside, found a link to", "lead out"

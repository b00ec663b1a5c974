"""Universal checkpoints in somebody's own script, and what must not be loaded."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.models.full import parameters, universal_loading
from tests.models.full import pretrain_cases
from tests.tiny_models import hf_llama, tokens

DIMS = pretrain_cases.sizes(True)
ZERO = "global_step0/zero"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("universal")
    hf_llama(DIMS).save_pretrained(base / "hf")
    convert(HfReader(base / "hf"), base / "universal", "universal")
    return base / "universal"


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "universal"))


@pytest.mark.parametrize("world, zero", [(2, 1), (4, 3)])
def test_a_plain_gpt_model_in_a_users_script(pools, made, world, zero):
    ids = tokens(DIMS)
    expected = float(F.cross_entropy(hf_llama(DIMS)(ids).logits.flatten(0, 1), ids.flatten()).detach())
    # ZeRO 1 reads the layout from the files.
    result = pools(world).run(pretrain_cases.load_into_a_users_model, folder=str(made), zero=zero, prepare=zero == 3)
    assert result == pytest.approx(expected, rel=1e-6)


def test_what_deepspeed_loads_scrambled_is_refused(pools, folder):
    """Without its mark a row-parallel weight is split along the wrong dim, and DeepSpeed sees the right size."""
    for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight"):
        path = folder / ZERO / f"decoder.layers.1.{name}" / "fp32.pt"
        state = torch.load(path)
        del state["cat_dim"]
        torch.save(state, path)
    result = pools(2).run(pretrain_cases.load_into_a_users_model, folder=str(folder), zero=1, prepare=False)
    assert result.startswith("CheckpointError")
    assert result.count("decoder.layers.1.") == 2
    assert "self_attention.linear_proj.weight" in result and "mlp.linear_fc2.weight" in result


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_no_file_is_executed(pools, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"param": torch.ones(3), "more": Hostile()}, folder / ZERO / "decoder.final_layernorm.weight/exp_avg.pt")
    (folder / ZERO / "odd.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError) as error:
        universal_loading.check_files_are_safe(folder)
    first, second = sorted(error.value.problems)
    assert "decoder.final_layernorm.weight/exp_avg.pt" in first and "odd.pt" in second
    assert not (tmp_path / "executed").exists()
    (folder / ZERO / "odd.pt").unlink()
    result = pools(2).run(pretrain_cases.load_into_a_users_model, folder=str(folder), zero=1)
    assert result.startswith("CheckpointError") and "exp_avg.pt" in result


def test_a_model_with_other_names_is_refused():
    with pytest.raises(ConfigError) as error:
        list(parameters.iterate_parameters(torch.nn.Linear(2, 2), DIMS))
    assert [problem.where for problem in error.value.problems] == ["weight", "bias"]

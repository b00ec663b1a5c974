"""The wheel: built, installed beside other packages of an environment, and used without this folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import megatron_ligo
from megatron_ligo.training import deepspeed_profile
from tests.tiny_models import hf_llama, llama_config

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("megatron_ligo", "pyproject.toml", "README.md", "LICENSE")
LARGE = {"num_layers": 4, "hidden_size": 64, "ffn_size": 96, "num_heads": 8, "num_kv_heads": 4}


def run(*words: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Returns the folder of a virtual environment's commands; its other packages are those of this process."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "source").mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "wheel", *options, "-w", folder, folder / "source", cwd=folder)
    venv.create(folder / "env", symlinks=True)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", folder / "env", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = next((folder / "env").glob("lib/python*/site-packages"))
    # A plain line: the .pth files of that folder, such as an editable install's, have no effect.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    hf_llama(llama_config(num_heads=6, num_kv_heads=3)).save_pretrained(folder / "small")
    return folder


def test_the_wheel_grows_a_model(installed, small):
    assert f"megatron_ligo {megatron_ligo.__version__}" in run(installed / "ligo", "--version", cwd=small)
    assert "commands" in run(installed / "ligo", "--help", cwd=small)
    sizes = [f"--set=large.{key}={value}" for key, value in LARGE.items()]
    run(installed / "ligo", "grow", "--set", "small.path=small", *sizes, "--output", "grown", cwd=small)
    assert (small / "grown/growth.json").is_file() and (small / "grown/hf/model.safetensors").is_file()


def test_the_wheel_has_the_profiles_types_and_licence(installed):
    code = "import megatron_ligo, sys; print(megatron_ligo.__file__)"
    package = Path(run(installed / "python", "-c", code, cwd=installed).strip()).parent
    assert installed.parent in package.parents
    assert {path.name for path in (package / "ds_configs").iterdir()} >= {"zero1.json", "zero2.json", "zero3.json"}
    assert (package / "py.typed").is_file() and (package / "__init__.pyi").is_file()
    assert list(package.parent.glob("megatron_ligo-*.dist-info/licenses/LICENSE"))


def test_the_top_folder_has_the_profiles_of_the_package():
    top = {path.name: path.read_bytes() for path in (ROOT / "ds_configs").iterdir()}
    assert top == {path.name: path.read_bytes() for path in deepspeed_profile.PROFILE_FOLDER.iterdir()}


def test_the_image_has_what_it_is_built_from():
    """The Dockerfile copies what the wheel and launch_scripts/setup.sh read, and what the commands of its page name."""
    lines = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.M)
    copied = {name for line in lines for name in line.split()[:-1]}
    setup = (ROOT / "launch_scripts/setup.sh").read_text()
    pinned = set(re.search(r'^files="(.+)"$', setup, re.M)[1].split())
    needed = {*BUILT_FROM, *pinned, "launch_scripts", "ds_configs", "tools"}
    assert needed == copied and all((ROOT / name).exists() for name in copied)


def test_one_version_everywhere():
    version = megatron_ligo.__version__
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


@pytest.mark.long
def test_the_wheel_trains_on_two_processes(installed, small):
    """From text to a pretrained model, each rank started by `--processes`."""
    (small / "corpus").mkdir()
    for number, path in enumerate(sorted((ROOT / "megatron_ligo").rglob("*.py"))[:60]):
        (small / "corpus" / f"{number}.txt").write_text(path.read_text())
    run(
        installed / "ligo",
        "prepare",
        "corpus",
        "--train-sentencepiece",
        "512",
        "--valid-fraction",
        "0.2",
        "--output",
        "data",
        cwd=small,
    )
    hf_llama(llama_config(vocab_size=512, num_heads=6, num_kv_heads=3)).save_pretrained(small / "model")
    sets = {
        "small.path": "model", "data.train": '["data/train"]', "data.valid": '["data/valid"]', "data.seq_length": 16,
        "fit.steps": 2, "pretrain.steps": 2, "pretrain.start": "large", "data.tokenizer": "data/tokenizer",
    } | {f"large.{key}": value for key, value in LARGE.items()}  # fmt: skip
    options = [f"--set={key}={value}" for key, value in sets.items()]
    run(installed / "ligo", "fit", "--processes", 2, *options, "--output", "fit", cwd=small)
    run(installed / "ligo", "grow", *options, "--operator", "fit", "--output", "large", cwd=small)
    run(installed / "ligo", "pretrain", "--processes", 2, *options, "--output", "run", cwd=small)
    assert (small / "run/pretrain.json").is_file()

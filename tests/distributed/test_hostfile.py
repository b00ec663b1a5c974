"""Hostfiles: faults by line, this machine's place in them, and the processes that they promise."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ligo.common.errors import ConfigError, LayoutError
from megatron_ligo.distributed import hostfile

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_nodes_are_read_in_order(tmp_path):
    text = "# two nodes\n\nb slots=4\na\tslots=2  # the small one\r\n"
    assert list(hostfile.read_hostfile(write(tmp_path, text)).items()) == [("b", 4), ("a", 2)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a slots=2\nb slot=2\na slots=1\n", ["line 2", "line 3", "a again"]),
        ("a slots=0\n", ["at least 1 slot"]),
        ("a slots=2x\n", ["line 1"]),
        ("# none\n", ["one line per node"]),
        ("a 2\nb\n", ["line 1", "line 2"]),
    ],
)
def test_every_fault_is_named(text, parts, tmp_path):
    with pytest.raises(ConfigError) as error:
        hostfile.read_hostfile(write(tmp_path, text))
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_file_that_cannot_be_read_is_refused(name, tmp_path):
    with pytest.raises(ConfigError, match="a readable text file"):
        hostfile.read_hostfile(tmp_path / name)


def test_this_machine_has_one_place(tmp_path, monkeypatch):
    hosts, path = {"other": 1, socket.gethostname(): 9}, tmp_path / "hosts"
    hostfile.check_node(hosts, 1, path)
    hostfile.check_node({"a": 1, "b": 1}, 0, path)
    with pytest.raises(LayoutError, match="which is node rank 1"):
        hostfile.check_node(hosts, 0, path)
    with pytest.raises(LayoutError, match="0 to 1"):
        hostfile.check_node(hosts, 2, path)
    for number in range(8):
        (tmp_path / "gpus" / f"{number}").mkdir(parents=True)
    monkeypatch.setattr(hostfile, "NVIDIA_DEVICES", tmp_path / "gpus")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(LayoutError, match="at most the 8 GPUs"):
        hostfile.check_node(hosts, 1, path)


def launch(*words: object, **env: str) -> subprocess.CompletedProcess:
    """Runs a command with this environment's programs first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **env}
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize(
    ("script", "arguments"), [("node.sh", ["0", "127.0.0.1", "tools/fit.py"]), ("hosts.sh", ["tools/fit.py"])]
)
def test_the_scripts_refuse_a_mistyped_hostfile(script, arguments, tmp_path):
    done = launch("bash", f"launch_scripts/{script}", tmp_path / "hostz", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 2 and "hostz: expected a readable text file" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_refuses_a_node_that_the_file_does_not_have(tmp_path):
    hosts = write(tmp_path, "a slots=1\nb slots=1\n")
    done = launch("bash", "launch_scripts/node.sh", hosts, 2, "127.0.0.1", "tools/fit.py")
    assert done.returncode == 2 and "0 to 1" in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["node.sh", "hosts.sh", "slurm.sbatch"])
def test_the_scripts_say_how_they_are_started(script):
    done = launch("bash", f"launch_scripts/{script}", SLURM_JOB_ID="")
    assert done.returncode == 2 and f"launch_scripts/{script} " in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["node.sh", "hosts.sh"])
def test_the_scripts_refuse_a_mistyped_command(script, tmp_path):
    place = ["0", "127.0.0.1"] if script == "node.sh" else []
    words = ("bash", f"launch_scripts/{script}", write(tmp_path, "a slots=1\nb slots=1\n"), *place, "fit.py")
    done = launch(*words, "--output", tmp_path / "out")
    assert done.returncode == 2 and f"{script}: expected a script" in done.stderr, done.stderr


def test_a_world_that_is_smaller_than_the_hostfile_does_not_train(tmp_path):
    words = (sys.executable, "tools/fit.py", "--output", tmp_path / "out")
    done = launch(*words, LIGO_WORLD_SIZE="4", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and "expected the 4 of the hostfile, found 2" in done.stderr, done.stderr


def test_a_launcher_without_its_hostfile_does_not_train(tmp_path):
    """`deepspeed --hostfile hostz` runs ranks so: its launcher on this node is their parent."""
    launcher = tmp_path / "deepspeed"
    launcher.write_text(
        "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, 'tools/fit.py', "
        "'--output', 'x']).returncode)\n"
    )
    done = launch(sys.executable, launcher, "--hostfile", "hostz")
    assert done.returncode == 2 and "DeepSpeed would train on this node alone" in done.stderr, done.stderr

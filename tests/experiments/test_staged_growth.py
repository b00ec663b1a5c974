"""Staged growth: a killed chain resumes; its report and lineage count FLOPs from the first stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ligo.common.errors import CheckpointError, ConfigError, DataError
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.config.run_config import HANDOFF_FORMATS
from megatron_ligo.config.run_identity import run_identity
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.experiments import staged_growth
from megatron_ligo.export import provenance
from megatron_ligo.export.pretrain_record import write_pretrain_record
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, RunInputs
from tests import layer_norm_models
from tests.training.test_pretrain import make_pair

ROOT = Path(__file__).resolve().parents[2]
SHARED = """
[shared.data]
train = ["{base}/train"]
valid = ["{base}/valid"]
seq_length = 12
[shared.fit]
save_every = 1
[shared.pretrain]
steps = 4
save_every = 1
"""
STAGES = """
[[stages]]
name = "small"
[stages.small]
path = "{base}/sizes/config.json"

[[stages]]
name = "medium"
[stages.large]
num_layers = 4
hidden_size = 48
num_heads = 12
max_positions = 30
vocab_size = 53
[stages.data]
seq_length = 20
[stages.operator]
noise = 0.5
[stages.fit]
steps = 2
[stages.pretrain]
steps = 3
first_sample = 32
"""


def start_chain(path: Path, output: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/stages.py", str(path), "--output", str(output)]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=-1, stderr=-1, start_new_session=True)


def wait_for(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out


def kill_during(process: subprocess.Popen, task: Path) -> None:
    """Kills all processes once a run has logged a step, or a growth has begun to write its first format."""
    deadline, metrics, growth = (
        time.monotonic() + 300,
        task / "metrics.jsonl",
        task / f".{HANDOFF_FORMATS[0]}.partial/content",
    )
    while not (metrics.is_file() and metrics.read_text()) and not growth.is_dir():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def task_states(path: Path, output: Path) -> dict[str, bool]:
    """Returns the chain's tasks in order, and whether each is done."""
    stages = staged_growth.load_stages(path, output)
    return {f"{stage.name}/{task.name}": task.is_done for stage in stages for task in stage.tasks()}


def losses(output: Path, run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tasks", [("medium/fit",), pytest.param((), marks=pytest.mark.long)], ids=["fit", "each"])
def test_a_chain_killed_in_its_tasks_resumes(tmp_path, tasks):
    for seed, name in enumerate(("train", "valid")):
        make_pair(tmp_path / name, seed)
    layer_norm_models.saved(tmp_path / "sizes", "gpt2", "GPT2LMHeadModel", n_layer=2, n_positions=12)
    path = tmp_path / "chain.toml"
    path.write_text((SHARED + STAGES).format(base=tmp_path))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wait_for(start_chain(path, whole))
    for run in tasks or task_states(path, killed):
        kill_during(start_chain(path, killed), killed / run)
        assert not task_states(path, killed)[run], f"{run} was killed too late"
    done = "small: pretrain" if tasks else "medium: grown"
    assert f"{done} is done" in wait_for(start_chain(path, killed))
    for run in ("small/pretrain", "medium/fit", "medium/pretrain"):
        assert losses(killed, run) == losses(whole, run), run
    links = json.loads((killed / staged_growth.RECORD).read_text())["stages"]
    assert [(link["stage"], link["run"]) for link in links] == [
        ("small", "pretrain"), ("medium", "fit"), ("medium", "grown"), ("medium", "pretrain"),
    ]  # fmt: skip
    assert links[-1]["flops_since_the_first_stage"] == sum(link["flops"] or 0 for link in links)
    assert links[2]["source"] == provenance.read(killed / "medium/grown")["source"]
    named = ("num_layers", "hidden_size", "max_positions", "vocab_size")
    sizes = [[link["model"][size] for size in named] for link in links]
    assert (sizes[0], sizes[3]) == ([2, 24, 12, 37], [4, 48, 30, 53])
    assert (killed / "report/report.html").is_file()


def test_a_stage_with_other_settings_is_refused(tmp_path, monkeypatch):
    """By its run.toml, by the record of its training, and by the content of what it stands on; nothing is run."""
    monkeypatch.setattr(staged_growth, "_run_command", lambda words: pytest.fail("a command was run"))
    make_pair(tmp_path / "train", 0)
    path, output, folder = tmp_path / "chain.toml", tmp_path / "out", tmp_path / "out/small"

    def load(extra: str = "") -> list:
        stage = f'[[stages]]\nname = "small"\n[stages.small]\npath = "x.json"\n[stages.pretrain]\nsteps = 4\n{extra}\n'
        path.write_text(f'[shared.data]\ntrain = ["{tmp_path}/train"]\n' + stage)
        return staged_growth.load_stages(path, output)

    (stage,) = load()
    inputs = RunInputs(DigestCache(), DEFAULT_POLICY, None)
    inputs.add_files({"data.train 1.bin": tmp_path / "train.bin"})
    record = {"run": run_identity(stage.config, "pretrain", ("small", "large")), "dims": {}, "grown": False, "step": 4}
    write_pretrain_record(folder / "pretrain", {**record, "inputs": inputs.entries})
    recorded: list = []
    monkeypatch.setattr(staged_growth, "write_lineage", lambda stages, output, accepted: recorded.append(accepted))
    staged_growth.run_stages([stage], output, print)
    for toml in (None, staged_growth._to_toml(stage.config.to_dict())):
        if toml:
            (folder / "run.toml").write_text(toml)
        with pytest.raises(ConfigError) as raised:
            staged_growth.run_stages(load("lr = 0.5\nseed = 99\n[stages.large]\nhidden_size = 96"), output, print)
        named = [problem.where for problem in raised.value.problems]
        assert named == ["small: large.hidden_size", "small: pretrain.lr", "small: pretrain.seed"]
        assert not toml or (folder / "run.toml").read_text() == toml
    staged_growth.run_stages(load("save_every = 7"), output, print)
    (tmp_path / "train.bin").write_bytes(bytes((tmp_path / "train.bin").stat().st_size))
    with pytest.raises(DataError) as raised:
        staged_growth.run_stages(load(), output, print)
    assert "train.bin" in str(raised.value)
    assert recorded[-1] == []
    staged_growth.run_stages(load(), output, print, accept_changed=True)
    ((entry,), lineage) = recorded[-1], output / "chain.json"
    assert entry["user"] and "train.bin" in entry["changes"][0]
    # It is known from then on, once.
    lineage.write_text(json.dumps({"accepted_changes": [entry]}))
    staged_growth.run_stages(load(), output, print, accept_changed=True)
    assert recorded[-1] == [entry]
    lineage.write_text('{"accepted_changes": [3]}')
    with pytest.raises(CheckpointError, match="the record of a chain"):
        staged_growth.run_stages(load(), output, print, accept_changed=True)


def test_the_small_format_is_that_of_the_first_stage(tmp_path):
    path = tmp_path / "chain.toml"
    small = '[shared.small]\npath = "models/small"\nformat = "hf"\n'
    path.write_text(small + '[[stages]]\nname = "one"\n[[stages]]\nname = "two"\n[stages.large]\nnum_layers = 4\n')
    formats = [stage.config.small.format for stage in staged_growth.load_stages(path, tmp_path / "out")]
    assert formats == ["hf", "auto"]


def test_faults_of_all_stages_are_reported_together(tmp_path):
    path = tmp_path / "chain.toml"
    path.write_text('[shraed]\n[[stages]]\nname = "a"\n[stages.pretrain]\nstepz = 1\n[[stages]]\nname = "a"\n')
    with pytest.raises(ConfigError) as raised:
        staged_growth.load_stages(path, tmp_path)
    text = "\n".join(raised.value.problems)
    assert all(key in text for key in ("shraed", "stepz", "stage 2"))
    path.write_text("stages = 3")
    with pytest.raises(ConfigError) as raised:
        staged_growth.load_stages(path, tmp_path)
    assert [problem.where for problem in raised.value.problems] == ["stages"]


def test_two_chains_cannot_share_a_folder(tmp_path):
    with exclusive_access(tmp_path / "out"), pytest.raises(ConfigError) as raised:
        staged_growth.run_stages([], tmp_path / "out", print)
    assert raised.value.problems[0].where == str(tmp_path / "out")

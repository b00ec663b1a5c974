"""Runs that are killed, terminated or hung at random moments: real commands on real ranks."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.training.checkpointing.engine_files import ALLOWED_GLOBALS
from tests.reliability.commands import Run
from tests.reliability.conftest import SAVE_EVERY, STEPS

ALL, ONE, TERM = "SIGKILL of all ranks", "SIGKILL of one", "SIGTERM to one"
# name: tool, ranks, layout, disturbances, further settings that change no number
CASES = {
    "fit, TP2 x PP2": ("fit", 4, ("fit.parallel.tp=2", "fit.parallel.pp=2"), (TERM, ONE), ()),
    "pretrain, ZeRO 3": ("pretrain", 2, ("pretrain.parallel.zero=3",), (ALL, TERM, ONE), ()),
    "pretrain in the background": (
        "pretrain",
        2,
        ("pretrain.parallel.zero=3",),
        (TERM, ONE),
        ("pretrain.async_save=true",),
    ),
}


def logged_steps(output: Path) -> list[dict]:
    """Returns the logged steps without their seconds."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def saved_results(output: Path, tool: str) -> tuple:
    """Returns every result that must not depend on disturbances."""
    last = max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    files = {path.name: file_content(torch_files.load(path, ALLOWED_GLOBALS)) for path in sorted(last.rglob("*.pt"))}
    if tool == "fit":
        record = json.loads((output / "operator/operator.json").read_text())
        return files, record["losses"], (output / "operator/operator.safetensors").read_bytes()
    return files, json.loads((output / "pretrain.json").read_text())["losses"]


def file_content(value: object) -> object:
    """Returns a file's content as comparable values: pickle bytes also encode object identity."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: file_content(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [file_content(part) for part in value]
    return file_content(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else value


def final_results(output: Path, tool: str) -> tuple:
    return logged_steps(output), saved_results(output, tool)


# Other tests kill a fit under the launcher and between two nodes.
LONG = ("fit, TP2 x PP2",)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case in LONG)) for case in CASES])
def test_a_disturbed_run_ends_like_the_undisturbed_one(config, whole, tmp_path, case):
    """Killed or terminated at random steps, every number is bit-identical."""
    tool, world, layout, disturbances, more = CASES[case]
    generator, output = random.Random(case), tmp_path / "killed"
    steps = sorted(generator.sample(range(2, STEPS - 4), len(disturbances)))
    for disturbance, step in zip(disturbances, steps, strict=True):
        with Run(tool, config, output, *layout, *more, world=world) as run:
            run.wait_for_step(step)
            DISTURBANCES[disturbance](run, generator.randrange(world))
    with Run(tool, config, output, *layout, *more, world=world) as run:
        assert run.exit_codes() == [0] * world, run.stderr(0)
    assert final_results(output, tool) == final_results(whole(tool, *layout, world=world), tool)
    assert [row["step"] for row in logged_steps(output)] == list(range(1, STEPS + 1))
    # No partial checkpoint is left.
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - SAVE_EVERY}", f"step_{STEPS}"]


def kill_all(run: Run, victim: int) -> None:
    run.signal(signal.SIGKILL, *range(len(run.ranks)))


def terminate_one(run: Run, victim: int) -> None:
    run.signal(signal.SIGTERM, victim)
    assert run.exit_codes(30) == [143] * len(run.ranks)
    assert "SIGTERM: saved after step" in run.stderr(0)
    assert not any("Traceback" in run.stderr(rank) for rank in range(len(run.ranks)))


def kill_one(run: Run, victim: int) -> None:
    began = time.monotonic()
    run.signal(signal.SIGKILL, victim)
    assert run.exit_codes(30) == [-9 if rank == victim else 2 for rank in range(len(run.ranks))]
    assert time.monotonic() - began < 20
    if victim:
        # On a busy machine another rank may answer too late.
        assert re.search(rf"ranks? [\d, ]*\b{victim}\b[\d, ]* has ended, without a word", run.stderr(0)), run.stderr(0)
    assert not any("Traceback" in run.stderr(rank) for rank in range(len(run.ranks)))


DISTURBANCES = {ALL: kill_all, TERM: terminate_one, ONE: kill_one}


def test_a_hanging_rank_is_named_after_the_timeout(config, tmp_path):
    with Run("fit", config, tmp_path / "a", "fit.parallel.tp=2", "fit.timeout_minutes=0.08") as run:
        run.wait_for_step(3)
        run.signal(signal.SIGSTOP, 1)
        run.ranks[0].join(40)
        assert run.ranks[0].exitcode == 2, run.stderr(0)
        assert "rank 1 does not answer, without a word" in run.stderr(0)

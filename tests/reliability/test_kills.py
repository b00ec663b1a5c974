"""Runs that are killed, stopped or starved at random moments, with the real commands on real ranks."""

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

ALL, ONE, ASKED = "SIGKILL of all ranks", "SIGKILL of one", "SIGTERM to one"
# Name: tool, ranks, layout, what befalls it.
CASES = {
    "fit, TP2 x PP2": ("fit", 4, ("fit.parallel.tp=2", "fit.parallel.pp=2"), (ASKED, ONE)),
    "pretrain, ZeRO 3": ("pretrain", 2, ("pretrain.parallel.zero=3",), (ALL, ASKED, ONE)),
}


def rows(output: Path) -> list[dict]:
    """What the run says of each step, without the clock's part."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def losses(output: Path, tool: str) -> tuple:
    """Everything that a run leaves and that must not depend on what befell it."""
    last = max((output / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    files = {path.name: content(torch_files.load(path, ALLOWED_GLOBALS)) for path in sorted(last.rglob("*.pt"))}
    if tool == "fit":
        record = json.loads((output / "operator/operator.json").read_text())
        return files, record["losses"], (output / "operator/operator.safetensors").read_bytes()
    return files, json.loads((output / "pretrain.json").read_text())["losses"]


def content(value: object) -> object:
    """What a file holds; the bytes of its pickle also say which equal texts were one object."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: content(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [content(part) for part in value]
    return content(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else value


def ended(output: Path, tool: str) -> tuple:
    return rows(output), losses(output, tool)


@pytest.mark.parametrize("case", CASES)
def test_whatever_befalls_a_run_it_ends_as_the_undisturbed_one(config, whole, tmp_path, case):
    """Killed or asked to end at random steps, every number is the same, bit for bit."""
    tool, world, layout, fates = CASES[case]
    draw, output = random.Random(case), tmp_path / "killed"
    for fate, moment in zip(fates, sorted(draw.sample(range(2, STEPS - 4), len(fates))), strict=True):
        with Run(tool, config, output, *layout, world=world) as run:
            run.reaches(moment)
            FATES[fate](run, draw.randrange(world))
    with Run(tool, config, output, *layout, world=world) as run:
        assert run.ends() == [0] * world, run.said(0)
    assert ended(output, tool) == ended(whole(tool, *layout, world=world), tool)
    assert [row["step"] for row in rows(output)] == list(range(1, STEPS + 1))
    # Nothing is left over of what was begun.
    kept = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert kept == [f"step_{STEPS - SAVE_EVERY}", f"step_{STEPS}"]


def all_killed(run: Run, victim: int) -> None:
    run.signal(signal.SIGKILL, *range(len(run.ranks)))


def one_asked(run: Run, victim: int) -> None:
    run.signal(signal.SIGTERM, victim)
    assert run.ends(30) == [143] * len(run.ranks)
    assert "SIGTERM: saved after step" in run.said(0)
    assert not any("Traceback" in run.said(rank) for rank in range(len(run.ranks)))


def one_killed(run: Run, victim: int) -> None:
    began = time.monotonic()
    run.signal(signal.SIGKILL, victim)
    assert run.ends(30) == [-9 if rank == victim else 2 for rank in range(len(run.ranks))]
    assert time.monotonic() - began < 20
    if victim:
        # On a busy machine another may be too late to say that it is there.
        assert re.search(rf"ranks? [\d, ]*\b{victim}\b[\d, ]* has ended, without a word", run.said(0)), run.said(0)
    assert not any("Traceback" in run.said(rank) for rank in range(len(run.ranks)))


FATES = {ALL: all_killed, ASKED: one_asked, ONE: one_killed}


def test_a_rank_that_hangs_is_named_when_the_time_is_over(config, tmp_path):
    with Run("fit", config, tmp_path / "a", "fit.parallel.tp=2", "fit.timeout_minutes=0.08") as run:
        run.reaches(3)
        run.signal(signal.SIGSTOP, 1)
        run.ranks[0].join(40)
        assert run.ranks[0].exitcode == 2, run.said(0)
        assert "rank 1 does not answer, without a word" in run.said(0)

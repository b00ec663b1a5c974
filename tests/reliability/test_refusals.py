"""User errors with real commands on real ranks: one message and the same exit code on all ranks, within seconds."""

from __future__ import annotations

import re
import shutil
import socket
import time
from pathlib import Path

import pytest

from megatron_ligo.common.file_lock import LOCK_FILE
from tests.reliability.commands import Run


def break_small_model(base: Path, place: Path, how: str) -> list[str]:
    """Returns --set arguments for a damaged copy of the small model."""
    small = place / "small"
    shutil.copytree(base / "small", small)
    weights = small / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    return [f"small.path={small}", f"pretrain.start={small}"]


REFUSED = {
    "a source that is not whole": ("fit", "truncated", "model.safetensors"),
    "a source without weights": ("pretrain", "missing", "model.safetensors"),
    "a layout for more processes": ("fit", ["fit.parallel.tp=4"], "multiple of tp x pp = 4 x 1 = 4, found 2"),
    "data that are not there": ("pretrain", ['data.train=["nowhere"]'], "nowhere"),
    "a key that is not known": ("fit", ["fit.stepps=3"], "Did you mean 'steps'?"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_one_message_and_exit_code_2_on_every_rank(base, config, tmp_path, fault):
    tool, sets, reason = REFUSED[fault]
    sets = break_small_model(base, tmp_path, sets) if isinstance(sets, str) else sets
    output = tmp_path / "out"
    begin = time.monotonic()
    with Run(tool, config, output, *sets) as run:
        assert run.exit_codes_as_launched() == [2, 2], run.stderr(0)
        assert reason in run.stderr(0)
        assert re.search(r"expected .*, found |unknown|Did you mean", run.stderr(0))
        assert "Traceback" not in run.stderr(0) + run.stderr(1)
        assert reason not in run.stderr(1), "the message is printed twice"
    assert time.monotonic() - begin < 30
    # Nothing that looks like a run, or like a part of one.
    left = {path.name for path in output.rglob("*") if path.is_file()} if output.exists() else set()
    assert left <= {LOCK_FILE}, left


def test_a_folder_that_another_run_writes_to(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    steps = "fit.steps=100000"
    with Run("fit", config, tmp_path / "out", steps) as first:
        first.wait_for_step(5)
        before = sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir())
        with Run("fit", config, tmp_path / "link", steps) as second:
            assert second.exit_codes_as_launched() == [2, 2]
            assert "expected a folder that no other run writes to" in second.stderr(0)
            assert "Traceback" not in second.stderr(0) + second.stderr(1)
        assert all(process.is_alive() for process in first.ranks) and before


def test_a_port_in_use(config, tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        with Run("fit", config, tmp_path / "out", port=other.getsockname()[1]) as run:
            run.ranks[0].join(60)
            assert run.ranks[0].exitcode == 2, run.stderr(0)
            assert "in use" in run.stderr(0) and "--master_port" in run.stderr(0)
            assert "Traceback" not in run.stderr(0)

"""The kill test itself: it goes on from its tally, and notices a command whose results depend on kills."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

import pytest

from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.testing import kill_test
from megatron_ligo.testing.kill_test import run_kill_test, run_outcome

# Counts its starts; a result that states the count depends on kills.
SCRIPT = """
import json, pathlib, sys, time
folder, honest = pathlib.Path(sys.argv[1]), sys.argv[2] == "honest"
folder.mkdir(exist_ok=True)
starts = folder / ".starts"
starts.write_text(str(int(starts.read_text() or 0) + 1 if starts.exists() else 1))
time.sleep(0.5)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": time.time()}) + "\\n")
(folder / "result.json").write_text(json.dumps({"path": str(folder), "n": 0 if honest else starts.read_text()}))
"""


def command(folder: Path, kind: str) -> list[str]:
    (folder / "script.py").write_text(SCRIPT)
    return [sys.executable, str(folder / "script.py"), "{output}", kind]


def test_a_later_call_goes_on_from_the_tally(tmp_path):
    words, output, lines = command(tmp_path, "honest"), tmp_path / "soak", []
    first = run_kill_test(words, output, 3, 1, lines.append)
    assert first.count == 3 and first.rounds >= 1 and first.steps == first.rounds
    again = run_kill_test(words, output, 5, 1, lines.append)
    assert again.count == 5 and again.rounds > first.rounds
    assert json.loads((output / "kills.json").read_text())["kills"] == again.kills
    assert sum(line.startswith("undisturbed") for line in lines) == 2 and "3 kills before" in lines[-3]
    for other, seed in ((command(tmp_path, "other"), 1), (words, 2)):
        with pytest.raises(ConfigError, match="this command's kills"):
            run_kill_test(other, output, 6, seed, lines.append)


def test_a_result_that_depends_on_kills_is_noticed(tmp_path):
    with pytest.raises(CheckpointError, match=r"found other result\.json"):
        run_kill_test(command(tmp_path, "dishonest"), tmp_path / "soak", 4, 1, lambda line: None)


def test_ranks_that_wait_for_one_that_failed_are_ended(tmp_path, monkeypatch):
    """Also if nobody waits for them as long as a launcher would in one call."""
    monkeypatch.setattr(kill_test, "LAUNCHER_WAITS", 0.5)
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.exit(1) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    run = kill_test._ForkedCommand([str(script), "{output}"], 2, tmp_path / "run")
    began = time.monotonic()
    while run.wait(0.1) is None:
        assert time.monotonic() - began < 30
    assert not run.processes()


def test_outcomes_leave_out_times(tmp_path):
    for number, name in enumerate(("a", "b")):
        folder = tmp_path / name
        (folder / "tensorboard").mkdir(parents=True)
        (folder / "tensorboard/events").write_text(name)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": number}) + "\n")
        (folder / "record.json").write_text(json.dumps({"value": 1, "peak_memory_bytes": number}))
        (folder / "weights.bin").write_bytes(b"same")
    assert run_outcome(tmp_path / "a") == run_outcome(tmp_path / "b")
    (tmp_path / "b/weights.bin").write_bytes(b"more")
    assert run_outcome(tmp_path / "a") != run_outcome(tmp_path / "b")


# A command whose second process works for a second after the first is killed, and then starts a third.
CHAIN = """
import subprocess, sys, time
output, stage, last = sys.argv[1:]
if stage == "first":
    subprocess.Popen([sys.executable, __file__, output, "second", last])
elif stage == "second":
    until = time.process_time() + 1.0
    while time.process_time() < until:
        pass
    subprocess.Popen([sys.executable, __file__, output, "third", last])
    sys.exit()
time.sleep(60 if stage == "first" or last == "stays" else 0)
"""


@pytest.mark.parametrize("last", ["ends", "stays"])
def test_processes_that_start_after_a_kill_are_waited_for(tmp_path, monkeypatch, last):
    """Those that use the CPU have time to end; one that sleeps on is named and ended."""
    monkeypatch.setattr(kill_test, "IDLE_LIMIT", 5.0)
    monkeypatch.setattr(kill_test, "IDLE_CPU", 0.02)
    (tmp_path / "chain.py").write_text(CHAIN)
    words = [sys.executable, str(tmp_path / "chain.py"), "{output}", "first", last]
    run = kill_test._LaunchedCommand(words, tmp_path / "round")
    deadline = time.monotonic() + 60
    while len(run.processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    if last == "ends":
        assert kill_test._kill(run, "SIGKILL to the first", random.Random(0))
    else:
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/round third stays"):
            kill_test._kill(run, "SIGKILL to the first", random.Random(0))
    assert not any(map(kill_test._is_alive, run.processes()))


def test_an_interrupted_test_ends_the_run_that_it_watches(tmp_path, monkeypatch):
    (tmp_path / "soak").mkdir()
    words = [sys.executable, "-c", "import sys, time; time.sleep(60)", "{output}"]
    monkeypatch.setattr(kill_test, "_read_tally", lambda folder, new: new)
    monkeypatch.setattr(kill_test, "run_outcome", lambda output: {})
    runs = []

    def interrupt(run, *arguments):
        runs.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(kill_test, "_run_once", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_kill_test(words, tmp_path / "soak", 1, 0, lambda line: None)
    assert runs[0].wait(20) == -9

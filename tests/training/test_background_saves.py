"""Checkpoints that another process writes while the training goes on; no kill or failed write leaves a part."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.run_record import describe_file
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.distributed import device
from megatron_ligo.training.checkpointing import engine_files
from megatron_ligo.training.checkpointing.background_writer import BackgroundWriter, stage
from megatron_ligo.training.checkpointing.engine_files import ALLOWED_GLOBALS, DigestingFile
from megatron_ligo.training.engine import Engine
from tests.reliability.test_kills import file_content
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import base, settings  # noqa: F401 - base: a fixture


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def contents(checkpoint: Path) -> dict:
    return {path.name: file_content(torch_files.load(path, ALLOWED_GLOBALS)) for path in checkpoint.rglob("*.pt")}


def pretrain_with_slow_writers(table: dict, output: str) -> tuple[dict, list[list[str]]]:
    """Its first writers wait until step 4 has begun. Returns the run's result and the checkpoints before each step."""
    gate, folder, seen = Path(output).with_suffix(".gate"), Path(output) / "checkpoints", []
    write, step = engine_files.write_file, Engine.train_step

    def write_late(state, path):
        wait_for(gate.exists)
        return write(state, path)

    def step_and_look(self, batches):
        seen.append(sorted(path.name for path in folder.glob("*step_*")))
        if self.steps == 3:
            gate.touch()
        return step(self, batches)

    engine_files.write_file, Engine.train_step = write_late, step_and_look
    return pretrain(table, output), seen


LAYOUTS = [{"zero": 2}, *(pytest.param(layout, marks=pytest.mark.long) for layout in ({"zero": 3}, {"pp": 2}))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_goes_on_and_the_checkpoint_is_that_of_its_step(pools, base, tmp_path, layout):  # noqa: F811
    """The writers of step 2 begin two steps later: they see the weights of step 2, as a fork does."""
    table = settings(base, save_every=2, keep_last=9, **layout)
    plain = pools(2).run(pretrain, settings=table, output=str(tmp_path / "plain"))
    table["pretrain"]["async_save"] = True
    late, seen = pools(2).run(pretrain_with_slow_writers, table=table, output=str(tmp_path / "late"))
    assert late["steps"][-1]["loss"] == plain["steps"][-1]["loss"]
    assert seen[:4] == [[], [], [".step_2.new"], [".step_2.new"]]
    assert "step_2" in seen[5] and ".step_2.new" not in seen[5]
    for step in (2, 4, 6):
        late_folder, plain_folder = (tmp_path / name / "checkpoints" / f"step_{step}" for name in ("late", "plain"))
        assert contents(late_folder) == contents(plain_folder)
        late_record, plain_record = (
            json.loads((folder / "record.json").read_text()) for folder in (late_folder, plain_folder)
        )
        assert {name: describe_file(late_folder / name) for name in late_record["files"]} == late_record["files"]
        assert late_record["state"]["losses"] == plain_record["state"]["losses"]


def pretrain_with_failing_writer(table: dict, output: str) -> tuple[dict | str, list[int]]:
    """Rank 1 finds the disk full at step 4. Returns the run's result and the steps that it has begun."""
    opened, step, begun = DigestingFile.__init__, Engine.train_step, []

    def open_on_full_disk(self, path):
        opened(self, path)
        if ".step_4" in str(path) and os.environ["RANK"] == "1":
            self._error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def step_slowly(self, batches):
        begun.append(self.steps)
        result = step(self, batches)
        wait_for(lambda: all(child.status() == psutil.STATUS_ZOMBIE for child in psutil.Process().children()))
        return result

    DigestingFile.__init__, Engine.train_step = open_on_full_disk, step_slowly
    return pretrain(table, output), begun


def test_a_failed_write_is_an_error_at_the_next_step(pools, base, tmp_path):  # noqa: F811
    table = settings(base, save_every=2, async_save=True)
    error, begun = pools(2).run(pretrain_with_failing_writer, table=table, output=str(tmp_path / "run"))
    assert isinstance(error, str) and "CheckpointError" in error and "No space left on device" in error
    assert begun == [0, 1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]


def test_a_killed_writer_is_named():
    writer = BackgroundWriter(lambda: time.sleep(60))
    assert not writer.is_done()
    os.kill(writer._pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="it was ended by SIGKILL"):
        writer.result()


def test_a_checkpoint_is_written_where_no_process_can_be_started(monkeypatch, tmp_path, caplog):
    """A fork of a large process may find no memory; on one rank only, the others would wait for it."""

    def refuse():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    files = engine_files.CheckpointFiles(None)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path / "a.pt", tmp_path / "missing" / "a.pt"):
        files.begin(in_background=True)
        files.save({"a": torch.ones(3)}, str(path))
        writer = files.start_writer()
        assert writer.is_done()
        if path.parent.exists():
            assert writer.result() == {path: describe_file(path)}
        else:
            with pytest.raises(CheckpointError, match="No such file"):
                writer.result()
    assert "Cannot allocate memory" in caplog.text
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files


def test_a_writer_ends_with_its_process():
    """Else it would write into the folder of the run that is started again."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.write(write, str(BackgroundWriter(lambda: time.sleep(60))._pid).encode())
        time.sleep(60)
    child = psutil.Process(int(os.read(read, 20)))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_device_memory_is_copied_once_for_each_storage(monkeypatch, tmp_path):
    flat = torch.arange(6.0)
    state = {"whole": flat, "parts": [flat[:2], flat[3:].view(3, 1)], "step": 3}
    before = file_content(state)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    staged = stage(state, {})
    flat.zero_()
    assert file_content(staged) == before
    assert staged["whole"].untyped_storage().data_ptr() == staged["parts"][1].untyped_storage().data_ptr()


def test_digests_are_those_of_the_file(tmp_path):
    entry = engine_files.write_file({"a": torch.randn(100, 3), "b": [1, "x"]}, tmp_path / "a.pt")
    assert entry == describe_file(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="No such file"):
        engine_files.write_file({}, tmp_path / "missing" / "a.pt")

"""Damaged, hostile and unwritable checkpoints: real runs on two ranks, real full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ligo.checkpoint.run_record import describe_file
from megatron_ligo.common.file_digest import seal
from tests.reliability import rank_cases
from tests.reliability.commands import ROOT
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import BATCH, STEPS, base, data, losses_of, settings  # noqa: F401 - base: a fixture

EVENTS = """
from megatron_ligo import cli
from megatron_ligo.training.metrics import Metrics

def main():
    with Metrics("{output}", True, 20_000) as metrics:
        for step in range(1, 20_000):
            metrics.log(step, 1.0, 0.1, 1, 1, 1.0, 1.0)

cli.run_command(main)
"""


class RunsOnLoad:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def files_of(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def snapshot(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in files_of(place)}


@pytest.fixture(scope="module")
def killed(pools, base, tmp_path_factory) -> Path:  # noqa: F811
    """A run of two ranks, killed in step 6, with checkpoints of steps 2 and 4."""
    output = tmp_path_factory.mktemp("killed") / "run"
    assert pools(2).run(pretrain, settings=settings(base), output=str(output), die_after=5) == {"killed": 5}
    assert names(output / "checkpoints") == ["step_2", "step_4"]
    return output


@pytest.fixture
def half_way(base, killed, tmp_path) -> tuple[dict, Path]:  # noqa: F811
    """A copy of the killed run, with its settings."""
    return settings(base), Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture(scope="module")
def whole(pools, base, tmp_path_factory) -> dict:  # noqa: F811
    return pools(2).run(pretrain, settings=settings(base), output=str(tmp_path_factory.mktemp("whole")))


def one_bit(place: Path) -> str:
    path = max(place.rglob("*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path.name


def truncated(place: Path) -> str:
    path = next(place.rglob("mp_rank_00_model_states.pt"))
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def deleted(place: Path) -> str:
    path = min(place.rglob("*optim_states.pt"))
    path.unlink()
    return path.name


def no_record(place: Path) -> str:
    (place / "record.json").write_text('{"version": 1')
    return "record.json"


def renamed(place: Path) -> str:
    shutil.rmtree(place)
    shutil.copytree(place.with_name("step_2"), place)
    return "expected the checkpoint of step 4, found 2"


def hostile(place: Path) -> str:
    """Forges the digest too: whoever can write the file can also do that."""
    path = next(place.rglob("mp_rank_00_model_states.pt"))
    torch.save({"module": RunsOnLoad(place.parent.parent / "it_ran")}, path)
    record = json.loads((place / "record.json").read_text())
    record["files"][str(path.relative_to(place))] = describe_file(path)
    (place / "record.json").write_text(json.dumps(seal(record)))
    return "could run code"


@pytest.mark.parametrize(
    "damage", [one_bit, truncated, deleted, no_record, renamed, hostile], ids=lambda damage: damage.__name__
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_loaded(pools, half_way, whole, damage):
    table, output = half_way
    reason = damage(output / "checkpoints/step_4")
    resumed = pools(2).run(rank_cases.pretrain_with_log, settings=table, output=str(output))
    assert resumed["taken"] == STEPS - 2
    assert losses_of(resumed) == losses_of(whole) and resumed["losses"] == whole["losses"]
    assert reason in resumed["log"] and "moved to step_4.damaged" in resumed["log"]
    assert names(output / "checkpoints") == ["step_4", "step_4.damaged", "step_6"]
    assert not (output / "it_ran").exists()


def test_if_all_are_damaged_the_run_does_not_restart_from_scratch(pools, half_way):
    table, output = half_way
    reasons = [one_bit(output / "checkpoints/step_2"), truncated(output / "checkpoints/step_4")]
    for _ in range(2):
        result = pools(2).run(pretrain, settings=table, output=str(output))
        assert "has no complete checkpoint (2 problems)" in result
        assert all(name in result for name in reasons)


def test_jumping_clocks_change_nothing(pools, half_way, whole):
    """File times change nothing either: the newest checkpoint is that of the latest step."""
    table, output = half_way
    os.utime(output / "checkpoints/step_4", (0, 0))
    resumed = pools(2).run(rank_cases.pretrain_with_jumping_clock, settings=table, output=str(output))
    assert resumed["taken"] == STEPS - 4
    assert losses_of(resumed) == losses_of(whole)


def test_a_full_disk_leaves_the_last_good_checkpoint(pools, base, whole, small_disk):  # noqa: F811
    table, output = settings(base), small_disk / "run"
    pools(2).run(pretrain, settings=table, output=str(output), die_after=3)
    before = snapshot(output / "checkpoints/step_2")
    room = os.statvfs(small_disk)
    size = sum(map(len, before.values()))
    (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize - size // 2))
    result = pools(2).run(pretrain, settings=table, output=str(output))
    assert isinstance(result, str) and "expected space and permission to write a checkpoint" in result
    assert "No space left on device" in result
    assert snapshot(output / "checkpoints/step_2") == before
    assert names(output / "checkpoints") == ["step_2"]
    (small_disk / "filler").unlink()
    resumed = pools(2).run(pretrain, settings=table, output=str(output))
    assert losses_of(resumed) == losses_of(whole)


def test_a_read_only_disk_is_reported(pools, base, small_disk):  # noqa: F811
    table, output = settings(base), small_disk / "run"
    place = output / "checkpoints"
    command = [f"mount --bind {place} {place}", f"mount -o remount,bind,ro {place}"]
    result = pools(2).run(rank_cases.pretrain_with_lost_disk, settings=table, output=str(output), command=command, at=3)
    assert isinstance(result, str) and "Read-only file system" in result and "step_4" in result
    assert names(place) == ["step_2"]
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_deleted_folder_is_reported_and_not_recreated(pools, base, tmp_path):  # noqa: F811
    table, output = settings(base), tmp_path / "run"
    command = [f"rm -r {output}"]
    result = pools(2).run(rank_cases.pretrain_with_lost_disk, settings=table, output=str(output), command=command, at=3)
    assert isinstance(result, str) and "No such file or directory" in result and "step_4" in result
    assert not output.exists()


def test_a_full_disk_in_tensorboards_thread_is_one_message(small_disk):
    """TensorBoard writes in its own thread."""
    (small_disk / "filler").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 40_000)
    )
    script = small_disk.parent / "job.py"
    script.write_text(EVENTS.format(output=small_disk / "run"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "expected free space on the disk, found it full" in done.stderr

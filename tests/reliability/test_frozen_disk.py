"""A stalled disk: a real file system that is frozen while a run writes to it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ligo.common.file_lock import LOCK_FILE
from tests.reliability.commands import TIMEOUT_SECONDS, Run
from tests.reliability.test_kills import final_results

# The same undisturbed run as in test_same_bytes_twice.py.
LAYOUT = "fit.parallel.tp=2"


class FreezableDisk:
    """32 MB of ext4. While it is frozen, a writing process waits in the kernel."""

    def __init__(self, place: Path):
        self.place = place
        image = place.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(32 << 20)
        place.mkdir()
        for command in (f"mkfs.ext4 -q -F {image}", f"mount -o loop {image} {place}"):
            subprocess.run(command.split(), check=True, capture_output=True)

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.place], check=True)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.place], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[FreezableDisk]:
    try:
        disk = FreezableDisk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system could be created here: {error}")
    yield disk
    subprocess.run(["fsfreeze", "--unfreeze", disk.place], check=False, capture_output=True)
    subprocess.run(["umount", "--lazy", disk.place], check=False)


def wait_until_exists(*paths: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} ever came"
        time.sleep(0.001)


@pytest.mark.long
def test_a_stalled_disk_is_waited_for_until_the_timeout(config, whole, disk):
    """A stall beyond timeout_minutes: the writing rank is named and the run resumes. Shorter: only time is lost."""
    output = disk.place / "run"
    with Run("fit", config, output, LAYOUT, "fit.timeout_minutes=0.08") as run:
        wait_until_exists(output / LOCK_FILE)
        disk.freeze()
        run.ranks[1].join(60)
        disk.thaw()
        assert run.exit_codes(60) == [2, 2], run.stderr(0)
        assert "rank 0 does not answer" in run.stderr(1)
        assert not any("Traceback" in run.stderr(rank) for rank in range(2))
    with Run("fit", config, output, LAYOUT) as run:
        # Being written, or on a busy machine already complete.
        wait_until_exists(output / "checkpoints/.step_4.new", output / "checkpoints/step_4")
        disk.freeze()
        time.sleep(2)
        disk.thaw()
        assert run.exit_codes() == [0, 0], run.stderr(0)
    assert final_results(output, "fit") == final_results(whole("fit", LAYOUT), "fit")

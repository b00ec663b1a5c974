"""A disk that stands still: a real file system, frozen while a run writes to it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ligo.common.file_lock import LOCK_FILE
from tests.reliability.commands import PATIENCE, Run
from tests.reliability.test_kills import ended

# The run that test_twice.py has made.
LAYOUT = "fit.parallel.tp=2"


class Disk:
    """32 MB of ext4. A process that changes a file while it is frozen waits in the kernel until it is not."""

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
def disk(tmp_path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system of its own could be made here: {error}")
    yield made
    subprocess.run(["fsfreeze", "--unfreeze", made.place], check=False, capture_output=True)
    subprocess.run(["umount", "--lazy", made.place], check=False)


def appears(*paths: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths} ever came"
        time.sleep(0.001)


@pytest.mark.long
def test_a_disk_that_stands_still_is_waited_for_until_the_time_is_over(config, whole, disk):
    """Longer than timeout_minutes: the rank that does not come back is named, and the run goes on when it is started
    again. Shorter: nothing but time is lost."""
    output = disk.place / "run"
    with Run("fit", config, output, LAYOUT, "fit.timeout_minutes=0.08") as run:
        appears(output / LOCK_FILE)
        disk.freeze()
        run.ranks[1].join(60)
        disk.thaw()
        assert run.ends(60) == [2, 2], run.said(0)
        assert "rank 0 does not answer" in run.said(1)
        assert not any("Traceback" in run.said(rank) for rank in range(2))
    with Run("fit", config, output, LAYOUT) as run:
        # On its way, or, on a busy machine, there already.
        appears(output / "checkpoints/.step_4.new", output / "checkpoints/step_4")
        disk.freeze()
        time.sleep(2)
        disk.thaw()
        assert run.ends() == [0, 0], run.said(0)
    assert ended(output, "fit") == ended(whole("fit", LAYOUT), "fit")

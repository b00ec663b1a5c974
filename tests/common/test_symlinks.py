"""What a checkpoint's folder must not hold: links out of it, and pipes, which would block their reader."""

from __future__ import annotations

import os

import pytest

from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.common.symlinks import check_symlinks


def test_pipes_and_links_out_of_the_folder_are_named(tmp_path):
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_text("1")
    (folder / "inside").symlink_to("weights")
    check_symlinks(folder)
    os.mkfifo(folder / "part/.metadata")
    (folder / "outside").symlink_to("../other")
    with pytest.raises(CheckpointError) as raised:
        check_symlinks(folder)
    assert [problem.where for problem in raised.value.problems] == ["outside", "part/.metadata"]

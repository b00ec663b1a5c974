"""Fixtures: ranks for multi-process tests (tests/rank_pool.py), and a small disk."""

from __future__ import annotations

import os

# tests/gpu starts its own processes, on GPUs.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import multiprocessing
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rank_pool import Ranks


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run layouts that differ little from others")


def pytest_collection_modifyitems(config, items):
    """Deselects tests marked `long` unless --long is given: the daily run takes half an hour."""
    if not config.getoption("--long"):
        left = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(scope="session")
def forks():
    """A fork server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


@pytest.fixture(scope="session")
def pools(forks):
    """`pools(world)` returns `Ranks` of that many processes."""
    return lambda world: Ranks(forks, world)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A mounted file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    built = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no file system of its own could be mounted here: {built.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=False)

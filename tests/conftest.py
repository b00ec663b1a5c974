"""The ranks that multi-process tests run on (tests/harness.py)."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import multiprocessing

import pytest

from tests.harness import Ranks


@pytest.fixture(scope="session")
def forks():
    """Starts processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


@pytest.fixture(scope="session")
def pools(forks):
    """`pools(world)` gives `world` ranks to run cases on."""
    return lambda world: Ranks(forks, world)

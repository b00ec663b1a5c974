"""One pool of ranks for each world size, started at its first use."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.harness import Pool


@pytest.fixture(scope="session")
def pools():
    started: dict[int, Pool] = {}

    def get(world: int) -> Pool:
        if world not in started or not started[world].alive:
            started[world] = Pool(world)
        return started[world]

    yield get
    for pool in started.values():
        pool.close()

"""What the ranks run: pretraining runs whose ranks come to differ, or whose disk is lost."""

from __future__ import annotations

import logging
import subprocess

import torch
import torch.distributed as dist

from megatron_ligo.training import replicas
from megatron_ligo.training.engine import Engine
from tests.training.pretraining import pretrain


def desynchronised(settings: dict, output: str, at: int, kind: str) -> dict | str:
    """A run in which rank 1 changes one bit of a parameter of which another rank has a copy, after step `at`."""
    step = Engine.train_step
    count = 0

    def disturbed(self, batches):
        nonlocal count
        answer = step(self, batches)
        count += 1
        if count == at and dist.get_rank() == 1:
            _flip(self, kind)
        return answer

    Engine.train_step = disturbed
    try:
        return pretrain(settings, output)
    finally:
        Engine.train_step = step


def _flip(engine: Engine, kind: str) -> None:
    named = next(iter(replicas._copies(engine)))[1]
    held = next(held for name, held in named.items() if kind in name)
    bits = held.detach().view(-1).view(torch.int32)
    bits[bits.numel() // 2] ^= 1


def logged(settings: dict, output: str) -> dict | str:
    """A run's record, with what it has logged (rank 0's)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_ligo")
    logger.addHandler(handler)
    found = pretrain(settings, output)
    return {**found, "log": "\n".join(lines)} if isinstance(found, dict) else found


def disk_lost_after(settings: dict, output: str, command: list[str], at: int) -> dict | str:
    """A run during whose step `at` + 1 a command takes its disk away."""
    step = Engine.train_step
    count = 0

    def disturbed(self, batches):
        nonlocal count
        count += 1
        if count == at + 1 and dist.get_rank() == 0:
            for line in command:
                subprocess.run(line.split(), check=True)
        return step(self, batches)

    Engine.train_step = disturbed
    return pretrain(settings, output)

"""Cases run on test ranks: runs with a flipped bit, a NaN sample, a lost disk or jumping clocks."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.text_dataset import TextDataset
from megatron_ligo.training import replica_check
from megatron_ligo.training.checkpointing import reshard, run_checkpoints
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.fit import Fit
from megatron_ligo.training.pretrain import MODEL_FOLDER, Pretrain
from tests.training.pretrain_runs import Killed, pretrain


def pretrain_with_flipped_bit(settings: dict, output: str, at: int, kind: str) -> dict | str:
    """Flips one bit of a replicated parameter on rank 1 after step `at`."""
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
    named = next(iter(replica_check.replicas_by_group(engine)))[1]
    stored = next(stored for name, stored in named.items() if kind in name)
    bits = stored.detach().view(-1).view(torch.int32)
    bits[bits.numel() // 2] ^= 1


def pretrain_with_log(settings: dict, output: str, **options) -> dict | str:
    """Returns a run's record with rank 0's log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("megatron_ligo")
    logger.addHandler(handler)
    record = pretrain(settings, output, **options)
    return {**record, "log": "\n".join(lines)} if isinstance(record, dict) else record


def pretrain_with_lost_disk(settings: dict, output: str, command: list[str], at: int) -> dict | str:
    """Runs shell commands that remove the disk during step `at` + 1."""
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


def pretrain_with_nan_sample(settings: dict, output: str, sample: int, look: bool = True) -> dict | str:
    """Makes one training sample's loss NaN. look: the run searches for the sample."""
    deal, again = TextDataset.train_batch, Engine.rerun_refused_step

    def dealt(self, *where):
        batches = deal(self, *where)
        for batch, samples in zip(batches, self.train_sample_ranges(*where), strict=True):
            if sample in samples:
                batch["loss_mask"][samples.index(sample)] = float("nan")
        return batches

    TextDataset.train_batch = dealt
    if not look:
        Engine.rerun_refused_step = lambda self, batches: ([], [])
    try:
        return pretrain_with_log(settings, output)
    finally:
        TextDataset.train_batch, Engine.rerun_refused_step = deal, again


def pretrain_with_wrong_labels(settings: dict, output: str, steps: list[int], **options) -> dict | str:
    """Replaces the labels of the steps `steps` (from 0) by random ones."""
    deal = TextDataset.train_batch

    def dealt(self, step, *where):
        batches = deal(self, step, *where)
        for batch in batches if step in steps else ():
            generator = torch.Generator().manual_seed(step)
            batch["labels"] = torch.randint(0, 36, batch["labels"].shape, generator=generator)
        return batches

    TextDataset.train_batch = dealt
    try:
        return pretrain_with_log(settings, output, **options)
    finally:
        TextDataset.train_batch = deal


def run_fit(settings: dict, output: str, die_after: int | None = None) -> dict:
    """Runs a fit and returns its record; optionally kills it after `die_after` steps."""
    step, count = Engine.train_step, 0

    def dying(self, batches):
        nonlocal count
        if count == die_after:
            raise Killed
        count += 1
        return step(self, batches)

    Engine.train_step = dying
    job = Fit(RunConfig.from_dict(settings), Path(output))
    try:
        job.run()
    except Killed:
        return {"killed": count}
    finally:
        job.engine.engine.destroy()
    return json.loads((Path(output) / "operator/operator.json").read_text())


def resume_and_save(settings: dict, output: str, to: str, lost: str = "") -> None:
    """Resumes a run at another layout and saves at once. lost: this moment is replaced by zeros."""
    fill = reshard.fill_optimizer

    def filled(engine, part, steps=None):
        def partly(name, parameter, kind):
            tensor = part(name, parameter, kind)
            return torch.zeros_like(tensor) if kind == lost else tensor

        fill(engine, partly, steps)

    reshard.fill_optimizer = filled
    try:
        job = Pretrain(RunConfig.from_dict(settings), Path(output))
        keep, model = run_checkpoints.Retention(1), job.output / MODEL_FOLDER
        run_checkpoints.save(job.engine, Path(to), job.engine.steps, job.checkpoint.state, keep, model)
        job.engine.engine.destroy()
    finally:
        reshard.fill_optimizer = fill


def pretrain_with_jumping_clock(settings: dict, output: str) -> dict | str:
    """Runs on ranks whose clocks jump by months, differently on each rank and at each reading."""
    generator, clock, nanoseconds = random.Random(dist.get_rank()), time.time, time.time_ns
    time.time = lambda: clock() + generator.uniform(-1e7, 1e7)
    time.time_ns = lambda: nanoseconds() + generator.randrange(-(10**16), 10**16)
    try:
        return pretrain(settings, output)
    finally:
        time.time, time.time_ns = clock, nanoseconds

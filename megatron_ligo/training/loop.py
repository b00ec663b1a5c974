"""The steps of a run, a fit's or a pretraining's: fed, guarded, recorded, saved, and ended when a signal asks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.common import signal_handling
from megatron_ligo.common.errors import Stopped
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.distributed import mesh
from megatron_ligo.training import replica_check
from megatron_ligo.training.checkpointing import run_checkpoints
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.loss_guard import LossGuard
from megatron_ligo.training.lr_schedule import learning_rate
from megatron_ligo.training.metrics import Metrics

FOLDER = "checkpoints"


def run(
    engine: Engine,
    data: ShardedSampler,
    settings: TrainingSection,
    output: Path,
    state: dict,
    tokens: int,
    flops: float,
    after: Callable[[int], dict[str, float]] = lambda step: {},
    beside: Path | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """From the step at which the engine stands to the last one. Collective.

    state: what is saved with each checkpoint; tokens, flops: of one step, over all ranks; after: called with the
    number of steps done, gives more values for the record; beside: a folder whose files go with each checkpoint;
    enough: asked between steps, true if the run is to end here.
    Raises Stopped when SIGINT or SIGTERM has come to any rank.
    """
    first, place = engine.steps, engine.mesh
    guard = LossGuard(engine, settings, state)
    with (
        signal_handling.deferred(settings.grace_seconds),
        Metrics(output, dist.get_rank() == 0, settings.steps, first) as metrics,
    ):
        for step in range(first, settings.steps):
            if enough():
                break
            began = time.monotonic()
            dealt = (step, settings.global_batch_size, settings.micro_batch_size, place.dp, place.dp_rank)
            batches = data.train_batch(*dealt)
            lr = learning_rate(settings, step)
            engine.set_lr(lr)
            loss, norm = engine.train_step(batches)
            seconds = time.monotonic() - began
            guard.look(step, loss, batches, data.train_sample_ranges(*dealt))
            metrics.log(step + 1, loss, lr, tokens, flops, seconds, norm, **after(step + 1))
            done, last = step + 1, step + 1 == settings.steps or enough()
            if due(done, settings.check_replicas_every):
                replica_check.check_replicas(engine, done)
            signum = mesh.max_over_ranks(signal_handling.received_signal() or 0)
            if last or signum or due(done, settings.save_every):
                run_checkpoints.save(engine, output / FOLDER, done, state, settings.keep_last, beside)
            if signum and not last:
                raise Stopped(signum, f"saved after step {done} of {settings.steps}. Started again, it goes on there.")


def due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0

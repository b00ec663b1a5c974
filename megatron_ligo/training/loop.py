"""The training loop of fits and pretraining runs: batches, checks, metrics, checkpoints and signals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.common import signal_handling
from megatron_ligo.common.errors import Stopped
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.data.sampler import Batch, ShardedSampler
from megatron_ligo.distributed import mesh
from megatron_ligo.distributed.mesh import Mesh, all_ranks
from megatron_ligo.export import run_inputs
from megatron_ligo.export.metrics_rows import ACCEPTED_CHANGES, ANOMALY, METRICS_STATE
from megatron_ligo.training import replica_check
from megatron_ligo.training.checkpointing import run_checkpoints
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.guard.loss_guard import LossGuard
from megatron_ligo.training.lr_schedule import learning_rate
from megatron_ligo.training.metrics import Metrics, StepCallback
from megatron_ligo.training.tracking.trackers import TrackerList, open_trackers

CHECKPOINTS_FOLDER = "checkpoints"


def run_steps(
    engine: Engine,
    data: ShardedSampler,
    section: TrainingSection,
    output: Path,
    state: dict,
    tokens: int,
    flops: float,
    guess_loss: float,
    accepted_step: int = 0,
    after_step: Callable[[int], dict[str, float]] = lambda step: {},
    extra_files: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: StepCallback | None = None,
    start_loss: float | None = None,
) -> None:
    """Trains from the engine's current step to the last one. Collective.

    state: saved with each checkpoint. tokens, flops: per step, over all ranks. guess_loss, accepted_step: as for
    `LossGuard`. after_step: takes the number of finished steps and returns further metrics. extra_files: a folder
    whose files are copied into each checkpoint.
    should_stop: ends the run early, checked between steps. on_step: called with each row of the metrics, on rank 0.
    start_loss: the held-out loss before the first step, if it is known.
    Raises Stopped if SIGINT or SIGTERM has reached any rank.
    """
    first_step, dims = engine.steps, engine.mesh
    accepted = " ".join(run_inputs.changes_accepted_at(state, first_step))
    guard = LossGuard(engine, section, state, guess_loss, output, accepted_step)
    if accepted:
        # Other data or another model has a level of its own.
        guard.detector.restart()
    saver = run_checkpoints.CheckpointSaver(engine, output / CHECKPOINTS_FOLDER, extra_files, section.async_save)
    with all_ranks().agree():
        trackers = open_trackers(section, output) if dist.get_rank() == 0 else TrackerList([])
    with (
        signal_handling.defer_signals(section.grace_seconds),
        closing(trackers),
        Metrics(
            output, dist.get_rank() == 0, section.steps, first_step, (trackers.add, on_step), trackers.add, state
        ) as metrics,
        closing(_read_ahead(data, section, dims, first_step)) as steps,
    ):
        if start_loss is not None and not first_step:
            metrics.log_start(eval_loss=start_loss)
            guard.record_start(start_loss)
        for step, batch, reading in steps:
            if should_stop():
                break
            start = time.monotonic()
            batches = reading.result()
            lr = learning_rate(section, step)
            engine.set_lr(lr)
            guard.begin_step()
            loss, norm = engine.train_step(batches)
            seconds = time.monotonic() - start
            report = guard.check_step(step, loss, batches, data.train_sample_ranges(*batch))
            done = step + 1
            extra = after_step(done) if report.error is None else {}
            if "eval_loss" in extra:
                guard.record_evaluation(done, extra["eval_loss"], report)
            texts = {ANOMALY: report.anomaly, ACCEPTED_CHANGES: accepted if step == first_step else None}
            texts = {key: text for key, text in texts.items() if text}
            metrics.log(done, loss, lr, tokens, flops, seconds, norm, texts, **report.columns, **extra)
            if report.error is not None:
                saver.settle()
                guard.stop(done, report.error)
            saver.poll()
            is_last = done == section.steps or should_stop()
            if is_due(done, section.check_replicas_every):
                replica_check.check_replicas(engine, done)
            signum = mesh.max_over_ranks(signal_handling.received_signal() or 0)
            if is_last or signum or is_due(done, section.save_every):
                if signum:
                    saver.settle()
                state[METRICS_STATE] = _bind_metrics(metrics)
                keep = run_checkpoints.Retention(section.keep_last, guard.protected_steps)
                saver.save(done, state, keep, wait=is_last or bool(signum))
            if signum and not is_last:
                raise Stopped(signum, f"saved after step {done} of {section.steps}. Start it again to resume there.")
        saver.finish()


def _bind_metrics(metrics: Metrics) -> dict:
    """Returns what a checkpoint states of the rows so far. Collective."""
    ranks = all_ranks()
    with ranks.agree():
        binding = metrics.bind()
    return ranks.all_gather(binding)[0]


def _read_ahead(
    data: ShardedSampler, section: TrainingSection, dims: Mesh, first_step: int
) -> Iterator[tuple[int, tuple[int, ...], Future[list[Batch]]]]:
    """Yields each step, the arguments that give its batches, and the batches, which a thread reads one step ahead."""
    reader = ThreadPoolExecutor(1, "read ahead")

    def read(step: int) -> tuple[int, tuple[int, ...], Future[list[Batch]]]:
        batch = (step, section.global_batch_size, section.micro_batch_size, dims.dp, dims.dp_rank)
        return step, batch, reader.submit(data.train_batch, *batch)

    try:
        ahead = None
        for step in range(first_step, section.steps):
            current = ahead or read(step)
            ahead = read(step + 1) if step + 1 < section.steps else None
            yield current
    finally:
        # A disk that stalls must not hold up the end.
        reader.shutdown(wait=False, cancel_futures=True)


def is_due(step: int, every: int) -> bool:
    """Returns True if `step` is a multiple of `every`; always False if `every` is 0."""
    return bool(every) and step % every == 0

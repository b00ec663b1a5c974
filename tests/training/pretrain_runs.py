"""Whole fits and pretraining runs, as functions that a pool of ranks can run."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ligo.common.errors import LigoError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.fit import Fit
from megatron_ligo.training.pretrain import Pretrain


class Killed(Exception):
    pass


def pretrain(settings: dict, output: str, die_after: int | None = None, resume: bool = False) -> dict | str:
    """Returns the record and metrics of a run, or its LigoError as text. die_after: steps after which it is killed.

    resume: accepts the anomaly at which the run has stopped.
    """
    count = 0
    step = Engine.train_step

    def step_or_die(self, batches):
        nonlocal count
        if count == die_after:
            raise Killed
        count += 1
        return step(self, batches)

    Engine.train_step = step_or_die
    job = None
    try:
        job = Pretrain(RunConfig.from_dict(settings), Path(output), resume_after_anomaly=resume)
        record = job.run()
    except Killed:
        return {"killed": count}
    except LigoError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Engine.train_step = step
        if job:
            # Its hooks would keep the engine and all process groups alive.
            job.engine.engine.destroy()
    file = Path(output) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {**record, "steps": rows, "taken": count}


def fit(settings: dict, output: str) -> None:
    job = Fit(RunConfig.from_dict(settings), Path(output))
    job.run()
    job.engine.engine.destroy()

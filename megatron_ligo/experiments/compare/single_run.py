"""Runs one job of a comparison: reads FOLDER/job.json, writes FOLDER/result.json.

Runs as one process, or on many ranks:

    deepspeed --num_gpus 4 --module megatron_ligo.experiments.compare.single_run FOLDER
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from megatron_ligo.checkpoint import formats
from megatron_ligo.common import signal_handling
from megatron_ligo.common.atomic_files import read_json, write_bytes, write_json
from megatron_ligo.common.errors import LigoError, NumbersError
from megatron_ligo.config.run_config import SCRATCH, RunConfig
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.token_codes import MAX_COUNTED, build_codes
from megatron_ligo.distributed.rank_failures import report_failures
from megatron_ligo.experiments.compare.run_folder import CHECKPOINTS, CODES, ERROR, FIT, GROW, JOB, RESULT, RUN
from megatron_ligo.export.handoff import grow_from_config
from megatron_ligo.export.metrics_rows import METRICS_FILE, read_metrics
from megatron_ligo.export.run_inputs import ACCEPTED, InputPolicy
from megatron_ligo.growth.codes.codes_file import RECORD
from megatron_ligo.report.curves import smooth
from megatron_ligo.training.fit import Fit
from megatron_ligo.training.initial_weights import scratch_model_config
from megatron_ligo.training.pretrain import Pretrain

# Of a run's curve in its result.
MAX_POINTS = 200
LOSS_DIGITS = 5


def run_job(folder: Path) -> None:
    """Runs or resumes the job; rank 0 writes its result."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    config, run = RunConfig.from_dict(job["config"], f"{folder / JOB}"), folder / RUN
    policy = InputPolicy(accept_changed=bool(job.get(ACCEPTED)))
    by_sample: list[float] = []
    other_loss = None
    if job["kind"] == GROW:
        operator = Path(job["operator"]) if job["operator"] else None
        grow_from_config(config, operator, run, accept_changed=policy.accept_changed)
        losses = {}
    elif job["kind"] == CODES:
        losses = {}
        source = None if config.pretrain.start == SCRATCH else formats.open_small(config.small)
        build_codes(config, scratch_model_config(config), run, source, MAX_COUNTED)
    elif job["kind"] == FIT:
        with report_failures():
            Fit(config, run, policy=policy).run()
        losses = json.loads((run / "operator" / "operator.json").read_text(encoding="utf-8"))["losses"]
    else:
        with report_failures():
            pretraining = Pretrain(config, run, policy=policy)
            losses = pretraining.run()["losses"]
            if not job["keep"] and "end" in losses:
                by_sample = [round(loss, LOSS_DIGITS) for loss in pretraining.losses_by_sample()]
                if job.get("other_valid"):
                    other_loss = _loss_on(pretraining, job["other_valid"])
    _finish(folder, run, losses, job["keep"], by_sample, other_loss)


def _loss_on(pretraining: Pretrain, valid: Sequence[str | float]) -> float:
    """Returns the mean loss of a finished run on as many samples of other held-out text. Collective."""
    config, samples = pretraining.config, pretraining.section.eval_samples
    data = replace(config.data, valid=tuple(valid))
    pretraining.data = open_dataset(data, pretraining.model_config, 0, samples, pretraining.output)
    return round(mean(pretraining.losses_by_sample()), LOSS_DIGITS)


def _finish(
    folder: Path,
    run: Path,
    losses: dict,
    keep: bool,
    by_sample: Sequence[float] = (),
    source_loss: float | None = None,
) -> None:
    """Writes the result. losses: {} for a run that diverged or has none; by_sample: on each held-out sample."""
    if os.environ.get("RANK", "0") != "0":
        return
    rows = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    if (run / RECORD).is_file():
        rows = [{"step": 0, "seconds": 0, **read_json(run / RECORD)}]
    totals = {key: rows[-1][key] if rows else 0 for key in ("step", "tokens", "flops", "seconds")}
    measured = {"sample_losses": list(by_sample)} if by_sample else {}
    if source_loss is not None:
        measured["source_loss"] = source_loss
    measured["evaluations"] = [(row["flops"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    write_json(folder / RESULT, {"losses": losses, **totals, "curve": thin_curve(rows), **measured})
    if not keep:
        shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def thin_curve(rows: Sequence[dict]) -> list[tuple[float, float]]:
    """Returns (FLOPs, smoothed training loss) of at most MAX_POINTS rows of the metrics, the last one among them."""
    finite = [row for row in rows if row.get("loss") is not None]
    points = list(zip((row["flops"] for row in finite), smooth([row["loss"] for row in finite]), strict=True))
    apart = -(-len(points) // MAX_POINTS) or 1
    return points[::-apart][::-1]


def main(folder: Path) -> int:
    """Runs the job and returns its exit code: 0 also for a run that diverged."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("megatron_ligo").setLevel(logging.INFO)
    try:
        run_job(folder)
    except NumbersError as error:
        # Divergence at a high learning rate is a result, not a failure.
        print(error, file=sys.stderr, flush=True)
        _finish(folder, folder / RUN, {}, keep=False)
    except LigoError as error:
        print(error, file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") == "0":
            write_bytes(folder / ERROR, f"{error}\n".encode())
        return error.exit_code
    return 0


if __name__ == "__main__":
    signal_handling.exit_process(main(Path(sys.argv[-1])))

"""The folder of one run of a comparison.

FOLDER/job.json      the job: kind, config, operator
FOLDER/run/          the output of the fit, growth or pretraining
FOLDER/result.json   losses and cost; written last
FOLDER/log.txt       stdout and stderr
"""

from __future__ import annotations

from pathlib import Path

JOB, RESULT, RUN, LOG, LOCK = "job.json", "result.json", "run", "log.txt", ".lock"
CHECKPOINTS = "checkpoints"
FIT, GROW, PRETRAIN, CODES = "fit", "grow", "pretrain", "codes"


def last_checkpoint(folder: Path) -> Path:
    """Returns the last checkpoint of a run that keeps its checkpoints."""
    checkpoints = [path for path in (folder / RUN / CHECKPOINTS).iterdir() if path.name.startswith("step_")]
    return max(checkpoints, key=lambda path: int(path.name.removeprefix("step_")))

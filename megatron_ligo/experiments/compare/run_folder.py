"""The folder of one run of a comparison.

FOLDER/job.json      the job: kind, config, operator
FOLDER/run/          the output of the fit, growth or pretraining
FOLDER/result.json   losses and cost; written last
FOLDER/log.txt       stdout and stderr
FOLDER/error.txt     the error that ended the last attempt
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

JOB, RESULT, RUN, LOG, ERROR, LOCK = "job.json", "result.json", "run", "log.txt", "error.txt", ".lock"
CHECKPOINTS = "checkpoints"
FIT, GROW, PRETRAIN, CODES = "fit", "grow", "pretrain", "codes"


def last_checkpoint(folder: Path) -> Path:
    """Returns the last checkpoint of a run that keeps its checkpoints."""
    checkpoints = [path for path in (folder / RUN / CHECKPOINTS).iterdir() if path.name.startswith("step_")]
    return max(checkpoints, key=lambda path: int(path.name.removeprefix("step_")))


def copy_run(source: Path, target: Path) -> None:
    """Copies a run's folder so that it can be extended. Checkpoints are linked: nothing writes into them."""
    checkpoints = source / CHECKPOINTS
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def copy_file(path: str, to: str) -> None:
        if Path(path).is_relative_to(checkpoints):
            os.link(path, to)
        else:
            shutil.copy2(path, to)

    shutil.copytree(source, partial, copy_function=copy_file)
    partial.rename(target)

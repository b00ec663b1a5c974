"""The folder of one run of a comparison.

FOLDER/job.json      what is to be done
FOLDER/run/          what a fit, a growth or a pretraining writes
FOLDER/result.json   what came of it; written last
FOLDER/log.txt       what it said
"""

from __future__ import annotations

from pathlib import Path

JOB, RESULT, RUN, LOG, LOCK = "job.json", "result.json", "run", "log.txt", ".lock"
CHECKPOINTS = "checkpoints"
FIT, GROW, PRETRAIN = "fit", "grow", "pretrain"


def last_checkpoint(folder: Path) -> Path:
    """Where a run that keeps its checkpoints has left the last one."""
    found = [path for path in (folder / RUN / CHECKPOINTS).iterdir() if path.name.startswith("step_")]
    return max(found, key=lambda path: int(path.name.removeprefix("step_")))

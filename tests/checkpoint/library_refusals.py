"""What a library raises for an input that it refuses, told from a fault of the test that gives it the input."""

from __future__ import annotations

import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
OWN_FOLDERS = (ROOT / "tests", ROOT / "megatron_ligo")


def check_raised_by_library(error: Exception) -> None:
    """Raises an error again if this repository's own code raised it: libraries raise any kind, also bare Exception."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in OWN_FOLDERS):
        raise error

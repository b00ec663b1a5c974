"""Commands that prepare data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_ligo import cli

CONFIG = "run.toml"


def print_next_of_data(output: str, settings: Iterable[str], small: str) -> None:
    """Prints the command that follows prepared data: a fit, or without a config in this folder the one that writes it.

    settings: KEY=VALUE of [data]; small: the small model's folder, or a word for it.
    """
    if not Path(CONFIG).exists():
        cli.print_next(output, "ligo", "init", small, "--to", "2x", "--data", output)
        return
    data = [f"--set={setting}" for setting in settings]
    cli.print_next(output, "ligo", "fit", "--config", CONFIG, *data, "--output", "runs/fit")

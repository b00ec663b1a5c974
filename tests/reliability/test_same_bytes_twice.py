"""The same command run twice writes the same bytes, except what RELIABILITY.md names."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ligo.common import library_log
from tests.reliability.commands import Run

LAYOUT = "fit.parallel.tp=2"
# The clock's and the machine's part.
OTHER = ("seconds", "peak_memory_bytes", "record_digest")


def outputs_of(output: Path) -> dict[str, object]:
    """Returns every file's bytes; of text files, without the parts that always differ."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "tfevents" not in path.name]
    return {str(path.relative_to(output)): part(path) for path in files if path.name != library_log.FILE_NAME}


def part(path: Path) -> object:
    if path.suffix == ".jsonl":
        return [same(json.loads(line)) for line in path.read_text().splitlines()]
    return same(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def same(value: object) -> object:
    if isinstance(value, list):
        return [same(entry) for entry in value]
    return {key: same(entry) for key, entry in value.items() if key not in OTHER} if isinstance(value, dict) else value


def test_a_run_leaves_the_same_bytes_each_time(config, whole, tmp_path):
    with Run("fit", config, tmp_path / "again", LAYOUT) as run:
        assert run.exit_codes() == [0, 0], run.stderr(0)
    one, other = outputs_of(whole("fit", LAYOUT)), outputs_of(tmp_path / "again")
    assert one.keys() == other.keys() and len(one) > 10
    assert not [name for name in one if one[name] != other[name]]

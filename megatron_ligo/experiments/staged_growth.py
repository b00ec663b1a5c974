"""Growth in stages: a chain of trainings, fits and growths, each a command of its own with a layout of its own.

OUTPUT/NAME/{run.toml, fit, grown, pretrain}    what the commands leave; each goes on where it was interrupted
OUTPUT/chain.json                               the lineage: sizes, methods, tokens, FLOPs and losses, run by run
OUTPUT/report                                   one page: losses against all FLOPs since the first stage
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.common.atomic_files import write_bytes, write_json
from megatron_ligo.common.errors import ConfigError, ErrorCollector, LigoError, Problem, Stopped, did_you_mean
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.export import provenance
from megatron_ligo.growth.operator_file import RECORD as OPERATOR_RECORD
from megatron_ligo.report import write_report
from megatron_ligo.report.run_records import PRETRAIN_RECORD, RecordedRun, read_runs

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RECORD, REPORT = "chain.json", "report"
STAGE_KEYS = ("name", "launcher")
DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class GrowthStage:
    """One model of the chain. before: the stage whose model it grows, None for the first."""

    name: str
    folder: Path
    launcher: tuple[str, ...]
    config: RunConfig
    before: GrowthStage | None

    @property
    def fitted(self) -> bool:
        return self.before is not None and self.config.fit.steps > 0

    def works(self) -> Iterator[tuple[str, list[str], bool]]:
        """What the stage does, in order: its folder's name, the command, whether it is done."""
        if self.fitted:
            yield (
                "fit",
                [*self._launched, str(TOOLS / "fit.py")],
                (self.folder / "fit/operator" / OPERATOR_RECORD).is_file(),
            )
        if self.before:
            learned = ["--operator", str(self.folder / "fit/operator")] if self.fitted else []
            done = (self.folder / "grown" / provenance.RECORD_NAME).is_file()
            yield "grown", [sys.executable, str(TOOLS / "grow.py"), *learned], done
        yield "pretrain", [*self._launched, str(TOOLS / "pretrain.py")], self._trained()

    @property
    def _launched(self) -> list[str]:
        return [*self.launcher] or [sys.executable]

    def _trained(self) -> bool:
        path = self.folder / "pretrain" / PRETRAIN_RECORD
        return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["step"] == self.config.pretrain.steps

    @property
    def trained(self) -> Path:
        """The checkpoint that it ends with."""
        return self.folder / f"pretrain/checkpoints/step_{self.config.pretrain.steps}/state"

    def runs(self) -> list[Path]:
        return [self.folder / name for name, _, _ in self.works()]


def load_stages(path: Path, output: Path) -> list[GrowthStage]:
    """The stages of a file. ConfigError with the faults of all of them, before anything is run."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(f"{path}", "a TOML file", error)) from None
    errors = ErrorCollector(f"chain {path}", ConfigError)
    for name in table.keys() - {"shared", "stages"}:
        errors.add(name, "[shared] or [[stages]]", "another section", did_you_mean(name, ("shared", "stages")))
    listed, shared = table.get("stages"), table.get("shared", {})
    if not isinstance(listed, list) or not all(isinstance(own, dict) for own in listed) or not isinstance(shared, dict):
        errors.add("stages", "a table [[stages]] for each model", "none")
        errors.raise_if_any()
    stages: list[GrowthStage] = []
    for number in range(1, len(listed) + 1):
        stage = _stage(listed, number, shared, stages, output, errors)
        if stage:
            stages.append(stage)
    errors.raise_if_any()
    return stages


def _stage(
    listed: list[dict], number: int, shared: dict, stages: list[GrowthStage], output: Path, errors: ErrorCollector
) -> GrowthStage | None:
    own = listed[number - 1]
    before, name, launcher = (stages[-1] if stages else None), own.get("name"), own.get("launcher", [])
    where = f"stage {number} ({name})"
    taken = [REPORT, *(other.get("name") for other in listed[: number - 1])]
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum() or name in taken:
        errors.add(f"{where}: name", "a word of its own", repr(name))
        return None
    if not isinstance(launcher, list) or not all(isinstance(word, str) for word in launcher):
        errors.add(f"{where}: launcher", "a list of words", repr(launcher))
        return None
    folder = output / name
    sections = _merge_tables(shared, {key: value for key, value in own.items() if key not in STAGE_KEYS})
    if before:
        given = {"small": {"path": str(before.trained)}}
        sections = _merge_tables(_merge_tables({"fit": {"steps": 0}}, sections), given)
        sections = _merge_tables(sections, {"pretrain": {"start": str(folder / "grown")}})
    try:
        config = RunConfig.from_dict(sections, where)
    except ConfigError as error:
        errors.note(str(error))
        return None
    if not config.pretrain.steps:
        errors.add(f"{where}: pretrain.steps", "at least 1: every stage trains its model", 0)
    return GrowthStage(name, folder, tuple(launcher), config, before)


def _merge_tables(below: Mapping, above: Mapping) -> dict:
    """Tables within tables, those above put over those below."""
    both = {
        key: _merge_tables(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(above[key], dict)
    }
    return {**below, **above, **both}


def run_stages(stages: Sequence[GrowthStage], output: Path, tell: Callable[[str], None]) -> None:
    """All that is not done yet, in order; after each stage the page and the lineage. Raises a command's fault."""
    with exclusive_access(output):
        for number, stage in enumerate(stages, 1):
            _run_stage(stage, tell)
            write_lineage(stages[:number], output)


def _run_stage(stage: GrowthStage, tell: Callable[[str], None]) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    config = stage.folder / "run.toml"
    write_bytes(config, _toml(stage.config.to_dict()).encode())
    for name, command, done in stage.works():
        tell(f"{stage.name}: {name}{' is done' if done else ''}")
        if not done:
            _run_command([*command, "--config", str(config), "--output", str(stage.folder / name)])


def _toml(sections: dict) -> str:
    """A config in TOML: JSON's plain values are TOML's, tables become dotted keys, and None is left out."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in _dotted_keys(sections))


def _dotted_keys(table: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _run_command(words: list[str]) -> None:
    """Runs a command to its end. It is asked to end when this process ends, and its signals are passed on."""

    def ask_to_end_with_us() -> None:
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGTERM)

    process = subprocess.Popen(words, preexec_fn=ask_to_end_with_us)
    try:
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Stopped(code - 128, "started again, the chain goes on there.")
    if code:
        raise LigoError(Problem(" ".join(words), "exit code 0", code, "Its own message is above."))


def write_lineage(stages: Sequence[GrowthStage], output: Path) -> None:
    """OUTPUT/chain.json and OUTPUT/report for the stages that are done."""
    runs = read_runs([folder for stage in stages for folder in stage.runs()])
    spent, links = _build_lineage(runs)
    write_report([run.folder for run in runs], output / REPORT, prior_flops=spent)
    write_json(output / RECORD, {"stages": links, "versions": library_versions()})


def _build_lineage(runs: list[RecordedRun]) -> tuple[dict[Path, float], list[dict]]:
    """By run's folder the FLOPs that were spent before it, and the lineage as plain data."""
    total, before, links = 0.0, {}, []
    for run in runs:
        before[run.folder] = total
        total += run.total("flops") or 0.0
        links.append(
            {
                "stage": run.folder.parent.name,
                "run": run.folder.name,
                "model": None if run.model_config is None else run.model_config.to_json(),
                "from": run.initialised_by,
                "losses": run.losses,
                "steps": run.steps,
                "tokens": run.total("tokens"),
                "flops": run.total("flops"),
                "flops_since_the_first_stage": total,
                "source": run.record.get("source"),
                "operator": run.record.get("operator") if run.kind == "hand-off" else None,
            }
        )
    return before, links

"""What a folder is, by the names of its files: so that no command writes into another thing's folder, and each reader
takes the folder of a run and picks the part that it reads."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem

log = logging.getLogger(__name__)

CHECKPOINTS, STEP_PREFIX, RECORD = "checkpoints", "step_", "record.json"
OPERATOR_FOLDER, OPERATOR_RECORD = "operator", "operator.json"
# The parts of a hand-off, the preferred one first.
HANDOFF_RECORD, HANDOFF_PARTS = "growth.json", ("universal", "hf")


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder. marks: patterns of names, one of which each such folder has, finished or not.

    other: patterns of small letters; a file whose name has one is no mark.
    """

    name: str
    marks: tuple[str, ...]
    other: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def is_kind_of(self, folder: Path) -> bool:
        return any(not self._is_other(path) for mark in self.marks for path in folder.glob(mark))

    def _is_other(self, path: Path) -> bool:
        return any(fnmatchcase(path.name.lower(), pattern) for pattern in self.other)


CHAIN = FolderKind("a chain of stages", ("chain.json",))
COMPARISON = FolderKind("a comparison or an advice", ("results.json", "advice.json"))
PRETRAINING = FolderKind("a pretraining", ("pretrain.json",))
HANDOFF = FolderKind("a hand-off", (HANDOFF_RECORD, "universal/latest_universal", ".universal.partial"))
FIT = FolderKind("a fit", (f"{OPERATOR_FOLDER}/{OPERATOR_RECORD}", "metrics.jsonl", f"{CHECKPOINTS}/{STEP_PREFIX}*"))
OPERATOR = FolderKind("an operator", (OPERATOR_RECORD,))
CODES = FolderKind("token codes", ("codes.json",))
DATA = FolderKind("prepared data", ("prepared.json", "*.idx", "train.safetensors", "valid.safetensors"))
MODEL = FolderKind(
    "a model",
    (
        "config.json", "dims.json", "manifest.json", "params.json", "latest", "latest_universal", ".metadata",
        "latest_checkpointed_iteration.txt", "mp_rank_*", "*.safetensors", "*.gguf", "pytorch_model*.bin",
        "consolidated.*.pth", "pytorch_model_fsdp_0/.metadata",
    ),
)  # fmt: skip
REPORT = FolderKind("a report", ("report.html",))
EVALUATION = FolderKind("an evaluation", ("eval.json", "tasks/text_*.yaml"))
SOAK = FolderKind("a soak test", ("kills.json", "fuzz.json"))
# A user may keep notes and logs in the folder of a run before it starts.
TEXTS = FolderKind(
    "texts",
    tuple(f"*{suffix}{packed}" for suffix in (".txt", ".jsonl") for packed in ("", ".gz", ".zst"))
    + ("*.parquet", "*.arrow"),
    ("*log*", "*out*", "*err*", "*note*", "*readme*", "*licen?e*", "*requirements*", "*todo*", "vocab*", "merges*"),
)
# The first kind with a mark is the folder's: published models may have files named as a fit's or a comparison's.
KINDS = (
    PRETRAINING, HANDOFF, OPERATOR, CODES, DATA, MODEL, CHAIN, COMPARISON, FIT, REPORT, EVALUATION, SOAK, TEXTS,
)  # fmt: skip


def identify(folder: Path) -> FolderKind | None:
    """Returns what a folder is; None if it is missing, empty or of no known kind."""
    if not folder.is_dir():
        return None
    return next((kind for kind in KINDS if kind.is_kind_of(folder)), None)


def check_output(folder: Path, kind: FolderKind, *others: FolderKind) -> None:
    """Raises ConfigError if a folder that is to become `kind` is a file, or another thing's.

    others: kinds that may be there.
    """
    if folder.exists() and not folder.is_dir():
        hint = "Choose another --output."
        raise ConfigError(Problem(f"--output {folder}", "a folder, or a free path for one", "a file", hint))
    present = identify(folder)
    if present not in (None, kind, *others):
        hint = "It stays as it is. Choose another --output."
        raise ConfigError(Problem(f"--output {folder}", f"a new folder, or one of {kind}", present, hint))


def find_model_part(path: Path) -> Path:
    """Returns the checkpoint to read at a path: that of a hand-off or a pretraining, else the path itself.

    Raises CheckpointError for folders that hold no model, naming the part that was meant.
    """
    kind = identify(path)
    if kind is HANDOFF:
        parts = [path / part for part in HANDOFF_PARTS if (path / part).is_dir()]
        if not parts or not (path / HANDOFF_RECORD).is_file():
            hint = "Let its writer finish, or give the subfolder."
            raise CheckpointError(Problem(f"{path}", f"a complete hand-off, with {HANDOFF_RECORD}", "none", hint))
        return _pick(path, kind, parts)
    if kind is PRETRAINING:
        records = (path / CHECKPOINTS).glob(f"{STEP_PREFIX}*/{RECORD}")
        # step_40.damaged is no checkpoint to read.
        steps = [record for record in records if _step_of(record).isdigit()]
        if not steps:
            hint = "Let it save one, or give what it started from."
            raise CheckpointError(Problem(f"{path}", "a model", "a pretraining without a checkpoint", hint))
        return _pick(path, kind, [max(steps, key=lambda record: int(_step_of(record))).parent])
    if kind in (FIT, OPERATOR):
        operator = path if kind is OPERATOR else path / OPERATOR_FOLDER
        hint = f"Grow the model first: ligo grow --operator {operator}"
        raise CheckpointError(Problem(f"{path}", "a model", kind, hint))
    if kind in (CHAIN, COMPARISON):
        raise CheckpointError(Problem(f"{path}", "a model", kind, "Give the folder of one of its runs."))
    return path


def find_operator_part(path: Path) -> Path:
    """Returns the operator's folder at a path: that of a fit, else the path itself."""
    part = path / OPERATOR_FOLDER
    return _pick(path, FIT, [part]) if identify(path) is FIT and part.is_dir() else path


def _pick(path: Path, kind: FolderKind, parts: list[Path]) -> Path:
    others = f" (it also has {', '.join(part.name for part in parts[1:])})" if parts[1:] else ""
    log.info("%s is %s: %s is read%s", path, kind, parts[0].relative_to(path), others)
    return parts[0]


def _step_of(record: Path) -> str:
    return record.parent.name.removeprefix(STEP_PREFIX)

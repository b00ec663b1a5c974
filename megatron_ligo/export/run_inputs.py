"""The inputs of a run by content: everything besides its settings that its numbers depend on.

A run's state holds `inputs`: name -> {path, kind, digest}, with the values themselves for a model's sizes. They are
compared when the run is resumed. `accepted_changes` lists what the user has let through, and at which step.
"""

from __future__ import annotations

import getpass
import logging
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.content import digest_state, digest_weights
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, DataError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import hash_json
from megatron_ligo.distributed.digest_cache import SAMPLED, WHOLE, DigestCache

log = logging.getLogger(__name__)

INPUTS, ACCEPTED = "inputs", "accepted_changes"
# How a model was opened: its format, and the keys of its config that the user let through.
FORMAT, ACCEPT = "format", "accept"
SMALL_MODEL = "small model"
WEIGHTS, STATE, SIZES, SAMPLES, INDICES, VALUES = "weights", "state", "sizes", "samples", "indices", "values"
KINDS = (WEIGHTS, STATE, SIZES, SAMPLES, INDICES, VALUES, WHOLE, SAMPLED)
RESTORE_HINT = "Bring it back, choose another --output, or pass --accept-changed-data, which is recorded."


@dataclass(frozen=True)
class InputPolicy:
    """accept_changed: changed inputs are recorded instead of refused. full_check: every file is read again."""

    accept_changed: bool = False
    full_check: bool = False


DEFAULT_POLICY = InputPolicy()


class RunInputs:
    """Collects the inputs of one run and compares them with those of the checkpoint that it resumes from.

    saved: the inputs in the checkpoint's state; None for a new run. adopted: the checkpoint is of a version that had
    no inputs: only those in `saved` are compared. Every method is collective over the cache's ranks.
    """

    def __init__(self, cache: DigestCache, policy: InputPolicy, saved: dict | None, adopted: bool = False):
        self.cache, self.policy, self.saved, self.adopted = cache, policy, saved, adopted
        self.entries: dict[str, dict] = {}
        self.accepted: list[dict] = []
        self._problems: list[Problem] = []
        self._compared: set[str] = set()

    def add_model(self, name: str, path: str, source: Reader, moments: bool = False) -> None:
        """Adds a checkpoint: its weights and sizes. moments: Adam's state too, if there is any."""
        digest = digest_state(source, self.cache) if moments else digest_weights(source, self.cache)
        self.entries |= describe_model(name, path, digest, source, STATE if moments else WEIGHTS)

    def add_sizes(self, name: str, path: str, model_config: ModelConfig, accept: Iterable[str] = ()) -> None:
        """Adds the sizes of a model without weights. accept: keys of its config that the user lets through."""
        self.entries[f"{name}: sizes"] = {**_describe_sizes(path, model_config), ACCEPT: sorted(accept)}

    def add_values(self, name: str, path: str, values: Mapping[str, object]) -> None:
        """Adds plain values that stand in a file."""
        self.entries[name] = {"path": path, "kind": VALUES, "digest": hash_json(values), "values": dict(values)}

    def add_files(self, files: Mapping[str, Path]) -> None:
        """Adds files by name. One that is missing is left out: the error of its own reader says more.

        A full check compares a file of which only samples were bound by these, and binds all of it from here on.
        """
        with self.cache.ranks.agree():
            files = {name: path for name, path in files.items() if path.is_file()}
        kinds = {path: self._saved_kind(name) for name, path in files.items() if self._saved_kind(name)}
        kinds |= self.cache.choose_kinds([path for path in files.values() if path not in kinds])
        digests = self.cache.digest_files(kinds)
        sampled = [path for path in kinds if kinds[path] == SAMPLED] if self.policy.full_check else []
        whole = self.cache.digest_files(dict.fromkeys(sampled, WHOLE))
        for name, path in files.items():
            self._add(name, f"{path}", kinds[path], digests[path])
            if path in whole:
                self._problems += self._compare({name})
                self._add(name, f"{path}", WHOLE, whole[path])

    def add_digest(self, name: str, path: str, kind: str, digest: str) -> None:
        """Adds an input whose digest is known. kind: SAMPLES, or INDICES."""
        self._add(name, path, kind, digest)

    def keep_saved(self, prefix: str, why: str) -> None:
        """Takes over the saved inputs whose names begin with a prefix: they can no longer be compared."""
        for name, entry in (self.saved or {}).items():
            if name.startswith(prefix):
                self.entries[name] = entry
                log.info("%s (%s) is not compared: %s", name, entry["path"], why)

    def add_problems(self, problems: list[Problem]) -> None:
        """Adds what is wrong with an input in itself."""
        self._problems += problems

    def check(self, step: int, complete: bool = True) -> None:
        """Compares the inputs added since the last check. DataError with every difference, unless they are accepted.

        complete: all inputs are there, so that a saved one that is missing has been taken away.
        """
        names = set(self.entries) | (set(self.saved or {}) if complete else set())
        problems = [*self._problems, *self._compare(names)]
        self._problems = []
        if not problems:
            return
        if not self.policy.accept_changed:
            before = "since the run began" if self.saved is not None else "since it was written"
            errors = ErrorCollector(f"what the run stands on has changed {before}", DataError)
            errors.problems.extend(problems)
            errors.raise_if_any()
        self.accepted.append({**describe_acceptance(problems), "step": step})

    def save_to(self, state: dict) -> None:
        """Puts the inputs, and what was accepted, into the run's state."""
        state[INPUTS] = self.entries
        if self.accepted:
            state[ACCEPTED] = [*state.get(ACCEPTED, []), *self.accepted]

    def _add(self, name: str, path: str, kind: str, digest: str) -> None:
        self.entries[name] = {"path": path, "kind": kind, "digest": digest}

    def _saved_kind(self, name: str) -> str | None:
        kind = (self.saved or {}).get(name, {}).get("kind")
        return kind if kind in (WHOLE, SAMPLED) else None

    def _compare(self, names: set[str]) -> list[Problem]:
        """Compares those of the inputs that have not been compared yet."""
        if self.saved is None:
            return []
        chosen = names - self._compared
        self._compared |= names
        return compare_entries(self.saved, self.entries, chosen, self.adopted)


def describe_model(name: str, path: str, digest: str, source: Reader, kind: str = WEIGHTS) -> dict:
    """Returns the inputs that `RunInputs.add_model` adds for a model of this digest, with how it was opened."""
    opened = {FORMAT: source.format, ACCEPT: sorted(source.accepted)}
    weights, sizes = {"path": path, "kind": kind, "digest": digest}, _describe_sizes(path, source.model_config)
    return {f"{name}: weights": {**weights, **opened}, f"{name}: sizes": {**sizes, **opened}}


def _describe_sizes(path: str, model_config: ModelConfig) -> dict:
    values = model_config.to_json()
    return {"path": path, "kind": SIZES, "digest": hash_json(values), "values": values}


def compare_entries(
    saved: dict, current: dict, names: Iterable[str] | None = None, adopted: bool = False
) -> list[Problem]:
    """Returns a problem for each of the inputs (None: all) that differs. adopted: `saved` may lack any of them."""
    names = saved.keys() | current.keys() if names is None else names
    return [
        problem
        for name in sorted(names)
        for problem in _compare_entry(name, saved.get(name), current.get(name), adopted)
    ]


def _compare_entry(name: str, before: dict | None, after: dict | None, adopted: bool) -> list[Problem]:
    if before is None or after is None:
        kind = (before or after)["kind"]
        # Sample indices belong to a number of samples.
        if kind == INDICES or (before is None and adopted):
            return []
        expected, actual = ("nothing", "a new input") if before is None else (f"digest {before['digest']}", "nothing")
        return [Problem(f"{name} ({(before or after)['path']})", expected, actual, RESTORE_HINT)]
    if before["digest"] == after["digest"]:
        return []
    where = f"{name} ({after['path']})"
    if before.get("values") and after.get("values"):
        old, new = before["values"], after["values"]
        keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        return [Problem(f"{where}: {key}", old.get(key), new.get(key), RESTORE_HINT) for key in keys]
    expected = f"digest {before['digest']}, as when the run began"
    return [Problem(where, expected, f"digest {after['digest']}", RESTORE_HINT)]


def describe_acceptance(problems: list[Problem]) -> dict:
    """Logs changes that the user lets through; returns who did so, when, and what they are."""
    for problem in problems:
        log.warning("accepted: %s", problem)
    return {**_describe_user(), "changes": [str(problem) for problem in problems]}


def changes_accepted_at(state: dict, step: int) -> list[str]:
    """Returns the changes that the user accepted when the run was started or resumed after `step` steps."""
    return [change for entry in state.get(ACCEPTED, []) if entry["step"] == step for change in entry["changes"]]


def _describe_user() -> dict:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return {"user": user, "host": socket.gethostname(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def read_saved(state: dict, where: Path) -> dict:
    """Returns the inputs in a checkpoint's state. CheckpointError if they are not as `save_to` writes them."""
    if INPUTS not in state:
        hint = "Choose another --output."
        raise CheckpointError(Problem(f"{where}", "the digests of the run's inputs", "none", hint))
    return read_inputs(state, f"{where}")


def read_inputs(record: Mapping, where: str) -> dict[str, dict]:
    """Returns the inputs in a record, none if it has no entry of them. CheckpointError unless `save_to` wrote them."""
    inputs = record.get(INPUTS, {})
    for name, entry in inputs.items() if isinstance(inputs, dict) else [("", None)]:
        if not _is_entry(entry):
            expected = f"an input's path, digest, and kind: {', '.join(KINDS)}"
            raise CheckpointError(Problem(f"{where}: {INPUTS} {name}", expected, f"{entry!r}"))
    return inputs


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.get("kind") not in KINDS:
        return False
    texts, accept = (entry.get("path"), entry.get("digest"), entry.get(FORMAT, "")), entry.get(ACCEPT, [])
    return isinstance(accept, list) and all(isinstance(text, str) for text in (*texts, *accept))

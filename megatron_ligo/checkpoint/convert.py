"""Converts any Reader to any writable format, atomically: one tensor at a time, with a digest of each.

A grown model is converted the same way: its Reader computes what others read from files. staging.py decides whether an
interrupted conversion resumes, and io/output.py skips the tensors that its journal lists as written.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.content import find_damage
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.io.dry_run import DryRunOutput
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.output import FileLayoutOutput, Output
from megatron_ligo.checkpoint.manifest import MANIFEST, Manifest, library_versions, load_manifest
from megatron_ligo.checkpoint.reader import MOMENTS, Reader
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.checkpoint.staging import Staging
from megatron_ligo.checkpoint.validated_reader import ValidatedReader, describe_non_finite
from megatron_ligo.common.errors import (
    CheckpointError,
    ConfigError,
    ErrorCollector,
    LigoError,
    MachineError,
    Problem,
    did_you_mean,
)
from megatron_ligo.common.file_digest import is_sidecar
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.distributed.digest_cache import DigestCache

log = logging.getLogger(__name__)

# Requests of another version are other jobs.
JOB_VERSION = 1

Progress = Callable[[int, int], None]  # bytes of the tensors done, bytes of all tensors


def open_source(path: str | Path, format: str | None = None, accept: Iterable[str] = ()) -> Reader:
    """Opens a checkpoint to convert; `format` and `accept` as in `formats.open`.

    If its headers are faulty, the readable tensors are checked too, and the CheckpointError also lists NaN and Inf.
    """
    try:
        return formats.open(path, format, accept)
    except CheckpointError as error:
        if error.collector is None or error.remaining_tensors is None:
            raise
        errors, remaining_tensors = error.collector, error.remaining_tensors
    for name, tensor in remaining_tensors():
        non_finite = describe_non_finite(tensor)
        if non_finite:
            errors.add(name, "finite numbers", non_finite)
    errors.raise_if_any()
    raise AssertionError("errors do not vanish")


def convert(
    source: Reader,
    target: str | Path,
    to: str,
    options: WriteOptions | None = None,
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    ranks: RankGroup = SINGLE_RANK,
) -> Manifest:
    """Writes a checkpoint of format `to` at `target` (a new folder) and returns its manifest.

    The target appears whole or not at all. A conversion that was killed resumes where it stopped. A target that the
    same request wrote is left as it is; `overwrite` replaces any other conversion there.
    extra_files: more JSON files for the folder, by name. ranks: the processes that call this together, with
    one target on a shared file system; the bytes written do not depend on their number.
    Raises CheckpointError with every bad tensor in one error, ConfigError for options that the format does not take.
    """
    with ranks.agree():
        target_format = formats.get(to)
        if not target_format.writable:
            hint = did_you_mean(to, formats.writers())
            raise ConfigError(Problem(f"format {to!r}", "one that can be written", "one that can only be read", hint))
        target = Path(target).absolute()
        options = target_format.check_options(options or WriteOptions())
        _check_locations(source, target)
        job = _describe_job(source, to, options)
    if ranks.world_size > 1 and progress:
        progress = _extrapolate(progress, ranks.world_size)
    conversion = _Conversion(source, target_format, options, ranks, progress)
    if ranks.rank:
        conversion.run_other_rank(Staging(target, job), overwrite)
        return load_manifest(target)
    return conversion.run_first_rank(Staging(target, job), overwrite, extra_files or {})


@dataclass(frozen=True)
class _Conversion:
    """One request, and the ranks that share the work."""

    source: Reader
    format: Format
    options: WriteOptions
    ranks: RankGroup
    progress: Progress | None

    def run_first_rank(self, staging: Staging, overwrite: bool, extra_files: Mapping[str, object]) -> Manifest:
        """Runs on rank 0: lays the files out, writes its share, commits what all ranks have written."""
        ranks = self.ranks
        with ExitStack() as resources:
            with ranks.agree():
                staging.target.parent.mkdir(parents=True, exist_ok=True)
                resources.enter_context(staging)
                finished = _find_finished(staging.target, staging.job, overwrite)
            if ranks.all_gather(bool(finished))[0] and self._is_damaged(staging.target, overwrite):
                finished = None
            with ranks.agree():
                if not finished:
                    reader = self._prepare(staging)
            if finished:
                log.info("%s is already there, written by the same request: left as it is", staging.target)
                return finished
            with _discard_on_refusal(staging):
                with ranks.agree(), Output(staging.content, staging.journal, self.options.workers, ranks) as output:
                    self.format.write(reader, output, self.options)
                    for name, value in extra_files.items():
                        output.write_json(name, value)
                with ranks.agree():
                    staging.absorb_journals()
                    reader.finish()
                digests = self._digest_files(staging, output.written)
                with ranks.agree():
                    return self._commit(staging, reader, digests)

    def run_other_rank(self, staging: Staging, overwrite: bool) -> None:
        """Runs on every other rank: writes its share between rank 0's preparation and its commit."""
        ranks = self.ranks
        with ranks.agree():
            pass
        finished = ranks.all_gather(False)[0] and not self._is_damaged(staging.target, overwrite)
        with ranks.agree():
            pass
        if finished:
            return
        with ranks.agree():
            if not staging.content.is_dir():
                hint = "Choose one that all nodes share, or use one process."
                raise CheckpointError(
                    Problem(f"{staging.target}", "a folder that every process sees", "nothing there", hint)
                )
            journal = staging.open_rank_journal(ranks.rank)
            with Output(staging.content, journal, self.options.workers, ranks) as output:
                self.format.write(self._validated(journal), output, self.options)
            journal.close()
        with ranks.agree():
            pass
        self._digest_files(staging, output.written)
        with ranks.agree():
            pass

    def _is_damaged(self, target: Path, overwrite: bool) -> bool:
        """True if a finished target has changed since it was written and may be replaced; CheckpointError if not."""
        problems = find_damage(target, DigestCache(self.ranks))
        if not overwrite:
            title = f"{target} has changed since it was written: remove it, or overwrite it, to have it written again"
            errors = ErrorCollector(title, CheckpointError)
            errors.problems.extend(problems)
            errors.raise_if_any()
        return bool(problems)

    def _digest_files(self, staging: Staging, written: list[str]) -> dict[str, str]:
        """Returns the digest of every file that was written, by name. All ranks read their share."""
        names = self.ranks.all_gather(sorted(written))[0]
        paths = {staging.content / name: name for name in names}
        return {paths[path]: digest for path, digest in DigestCache(self.ranks).read_files([*paths]).items()}

    def dropped_moments(self) -> str | None:
        """Returns the manifest's line about moments that are not written; None if they are, or there are none."""
        if not self.source.has_moments:
            return None
        if not self.format.stores_moments:
            return "optimizer state"
        why = self.format.unsupported_moments(self.source, self.options)
        return f"optimizer state ({why})" if why else None

    def _validated(self, journal: Journal) -> ValidatedReader:
        with_moments = self.dropped_moments() is None
        return ValidatedReader(self.source, self.options.dtype, with_moments, journal, self.progress)

    def _prepare(self, staging: Staging) -> ValidatedReader:
        """Counts the bytes to write, checks that they fit on the disk, and lays the files out for several ranks."""
        staging.begin()
        if staging.resumed:
            log.info("resuming the interrupted conversion to %s", staging.target)
        warning = self.format.reader_warning(self.source.model_config)
        if warning:
            log.warning("%s", warning)
        reader = self._validated(staging.journal)
        with (
            _discard_on_refusal(staging),
            tempfile.TemporaryDirectory(dir=staging.partial) as scratch,
            DryRunOutput(Path(scratch)) as dry_run,
        ):
            self.format.write(reader, dry_run, self.options)
        staging.check_space(dry_run.bytes)
        if self.ranks.world_size > 1:
            with FileLayoutOutput(staging.content) as layout:
                self.format.write(reader, layout, self.options)
        return reader

    def _commit(self, staging: Staging, reader: ValidatedReader, digests: dict[str, str]) -> Manifest:
        source, options = self.source, self.options
        # At step 0 there is no state yet, whatever a format stores in its place.
        dropped = self.dropped_moments() if source.step else None
        left_behind = [*source.unread, *([dropped] if dropped else [])]
        if left_behind:
            log.info("left behind: %s", "; ".join(left_behind))
        manifest = Manifest(
            format=self.format.name,
            dims=source.model_config,
            step=source.step,
            layout={"tp": options.tp, "pp": options.pp},
            job=staging.job,
            source={"format": source.format, "path": str(source.path) if source.path else None},
            tensors=reader.digests(),
            files={name: (staging.content / name).stat().st_size for name in digests},
            digests=digests,
            left_behind=left_behind,
            accepted={key: describe_value(value) for key, value in source.accepted.items()},
            versions=library_versions(),
        )
        with Output(staging.content) as output:
            output.write_json(MANIFEST, manifest.to_json())
        staging.commit([*digests, MANIFEST])
        return manifest


def _extrapolate(progress: Progress, world: int) -> Progress:
    """Returns `progress` scaled from one rank to all ranks, whose shares are about equal."""
    return lambda done, total: progress(min(done * world, total), total)


@contextmanager
def _discard_on_refusal(staging: Staging) -> Iterator[None]:
    """Discards the stage if the input is refused, since a second run would be too. A MachineError keeps it."""
    try:
        yield
    except MachineError:
        raise
    except LigoError:
        staging.discard()
        raise


def _check_locations(source: Reader, target: Path) -> None:
    if source.path is None:
        return
    origin, destination = source.path.resolve(), target.resolve()
    inside = origin in destination.parents or (destination in origin.parents and destination.is_dir())
    if origin == destination or inside:
        found = "one inside the other" if inside else "the source itself"
        raise ConfigError(Problem(f"{target}", "a path outside of the source", found, "Choose another target."))


def _describe_job(source: Reader, to: str, options: WriteOptions) -> dict:
    """Returns everything (JSON) that must be equal for two runs to be the same conversion."""
    stated_options = {name: str(value) for name, value in asdict(options).items() if name != "workers"}
    fingerprint = source.fingerprint()
    if fingerprint is None:
        # Nothing proves that a second run reads the same tensors: it must not resume the first.
        fingerprint = uuid.uuid4().hex
    path = str(source.path.resolve()) if source.path else None
    origin = {"format": source.format, "path": path, "fingerprint": fingerprint, "dims": source.model_config.to_json()}
    return {"version": JOB_VERSION, "source": origin, "to": to, "options": stated_options, "moments": MOMENTS}


def _find_finished(target: Path, job: str, overwrite: bool) -> Manifest | None:
    """Returns the manifest of a target that the same request wrote; None if the path is free or may be overwritten.

    Raises CheckpointError if anything else is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    expected, hint = "a path for a new folder", "Choose another target, or remove it."
    if not target.is_dir():
        raise CheckpointError(Problem(f"{target}", expected, "a file", hint))
    try:
        manifest = load_manifest(target)
    except CheckpointError as error:
        own = (target / MANIFEST).is_file()
        actual = f"one with a damaged manifest ({error})" if own else "a folder that this program did not write"
        raise CheckpointError(Problem(f"{target}", expected, actual, hint)) from None
    if manifest.job == job and _list_names(target) <= manifest.files.keys():
        return manifest
    if not overwrite:
        hint = "Choose another target, or pass --overwrite."
        raise CheckpointError(Problem(f"{target}", expected, "another conversion", hint))
    return None


def _list_names(folder: Path) -> set[str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST and not is_sidecar(file)]
    return {str(file.relative_to(folder)) for file in files}

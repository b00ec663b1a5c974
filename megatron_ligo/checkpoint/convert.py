"""From any Reader to any format: one tensor at a time, digested beside the copy, all or nothing.

A grown model is converted in the same way: its Reader computes what others read.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.io.dry_run import DryRunOutput
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.output import FileLayoutOutput, Output
from megatron_ligo.checkpoint.manifest import MANIFEST, VERSION, Manifest, library_versions, load_manifest
from megatron_ligo.checkpoint.reader import MOMENTS, Reader
from megatron_ligo.checkpoint.staging import Staging
from megatron_ligo.checkpoint.validated_reader import ValidatedReader, describe_non_finite
from megatron_ligo.common.errors import (
    CheckpointError,
    ConfigError,
    LigoError,
    MachineError,
    Problem,
    did_you_mean,
)
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of the tensors done, of all


def open_source(path: str | Path, form: str | None = None) -> Reader:
    """The Reader of what is to be converted (form: as `formats.open`). Where the headers are faulty, the numbers of
    what is there are looked at as well: the one CheckpointError tells of NaN and Inf, too.
    """
    try:
        return formats.open(path, form)
    except CheckpointError as error:
        if error.collector is None or error.remaining_tensors is None:
            raise
        errors, remaining_tensors = error.collector, error.remaining_tensors
    for name, tensor in remaining_tensors():
        bad = describe_non_finite(tensor)
        if bad:
            errors.add(name, "finite numbers", bad)
    errors.raise_if_any()
    raise AssertionError("faults do not vanish")


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

    The target appears whole or not at all. A conversion that was killed is taken up where it stopped. A target that
    the same request wrote is left as it is; `overwrite` puts the new one in the place of any other that we wrote.
    beside: more JSON files for the folder, by name. ranks: the processes that call this together, with one target
    on a file system that they share; the bytes are those that one process writes alone.
    Raises CheckpointError with every bad tensor in one error.
    """
    with ranks.agree():
        target_format = formats.get(to)
        if not target_format.writable:
            raise ConfigError(f"format {to!r} can only be read. {did_you_mean(to, formats.writers())}")
        target = Path(target).absolute()
        options = target_format.check_options(options or WriteOptions())
        _check_locations(source, target)
        job = _describe_job(source, to, options)
    if ranks.world_size > 1 and progress:
        progress = _progress_of_all(progress, ranks.world_size)
    if ranks.rank:
        _write_share(target_format, source, Staging(target, job), options, ranks, progress)
        return load_manifest(target)
    with ExitStack() as held:
        with ranks.agree():
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = held.enter_context(Staging(target, job))
            done = _find_finished(target, stage.job, overwrite)
            if not done:
                checked = _prepare(target_format, source, stage, options, ranks, progress)
        ranks.all_gather(not done)
        if done:
            log.info("%s is there already, from the same request: left as it is", target)
            return done
        with _discard_on_refusal(stage):
            with ranks.agree(), Output(stage.content, stage.journal, options.workers, ranks) as output:
                target_format.write(checked, output, options)
                for name, value in (extra_files or {}).items():
                    output.write_json(name, value)
            with ranks.agree():
                stage.absorb_journals()
                checked.finish()
                lost = _dropped_moments(target_format, source, options)
                left = [*source.unread, *([lost] if lost else [])]
                return _finish(stage, output.written, checked, left, to, options)


def _prepare(
    target_format: Format,
    source: Reader,
    stage: Staging,
    options: WriteOptions,
    ranks: RankGroup,
    progress: Progress | None,
) -> ValidatedReader:
    """What the first process does before all of them write."""
    stage.begin()
    if stage.resumed:
        log.info("going on with the conversion to %s that was interrupted", stage.target)
    warning = target_format.reader_warning(source.model_config)
    if warning:
        log.warning("%s", warning)
    checked = _validated(target_format, source, options, stage.journal, progress)
    with _discard_on_refusal(stage):
        needed = _count_bytes(target_format, checked, options, stage.partial)
    stage.check_space(needed)
    if ranks.world_size > 1:
        with FileLayoutOutput(stage.content) as output:
            target_format.write(checked, output, options)
    return checked


def _write_share(
    target_format: Format,
    source: Reader,
    stage: Staging,
    options: WriteOptions,
    ranks: RankGroup,
    progress: Progress | None,
) -> None:
    """What the processes but the first do: their tensors, between the first one's beginning and its end."""
    with ranks.agree():
        pass
    if not ranks.all_gather(None)[0]:
        return
    with ranks.agree():
        if not stage.content.is_dir():
            hint = "Choose one that all nodes share, or use one process."
            raise CheckpointError(Problem(f"{stage.target}", "a folder that every process sees", "nothing there", hint))
        journal = stage.open_rank_journal(ranks.rank)
        with Output(stage.content, journal, options.workers, ranks) as output:
            target_format.write(_validated(target_format, source, options, journal, progress), output, options)
        journal.close()
    with ranks.agree():
        pass


def _validated(
    target_format: Format, source: Reader, options: WriteOptions, journal: Journal, progress: Progress | None
) -> ValidatedReader:
    return ValidatedReader(
        source, options.dtype, _dropped_moments(target_format, source, options) is None, journal, progress
    )


def _progress_of_all(progress: Progress, world: int) -> Progress:
    """One process's progress as that of all, which have as much to do."""
    return lambda done, total: progress(min(done * world, total), total)


@contextmanager
def _discard_on_refusal(stage: Staging) -> Iterator[None]:
    """What is refused is refused again: there is nothing to go on from. What a machine fails at may go on."""
    try:
        yield
    except MachineError:
        raise
    except LigoError:
        stage.discard()
        raise


def _count_bytes(target_format: Format, source: Reader, options: WriteOptions, place: Path) -> int:
    """Bytes that the writer will write."""
    with tempfile.TemporaryDirectory(dir=place) as scratch, DryRunOutput(Path(scratch)) as plan:
        target_format.write(source, plan, options)
    return plan.bytes


def _dropped_moments(target_format: Format, source: Reader, options: WriteOptions) -> str | None:
    """What is said of moments that stay behind; None where they go along, or there are none."""
    if not source.has_moments:
        return None
    if not target_format.stores_moments:
        return "optimizer state"
    why = target_format.unsupported_moments(source, options)
    return f"optimizer state ({why})" if why else None


def _finish(
    stage: Staging, written: list[str], checked: ValidatedReader, left: list[str], to: str, options: WriteOptions
) -> Manifest:
    source = checked.source
    if left:
        log.info("left behind: %s", "; ".join(left))
    manifest = Manifest(
        format=to,
        dims=source.model_config,
        step=source.step,
        layout={"tp": options.tp, "pp": options.pp},
        job=stage.job,
        source={"format": source.format, "path": str(source.path) if source.path else None},
        tensors=checked.digests(),
        files={name: (stage.content / name).stat().st_size for name in sorted(written)},
        left_behind=left,
        versions=library_versions(),
    )
    with Output(stage.content) as output:
        output.write_json(MANIFEST, manifest.to_json())
    stage.commit([*written, MANIFEST])
    return manifest


def _check_locations(source: Reader, target: Path) -> None:
    if source.path is None:
        return
    one, other = source.path.resolve(), target.resolve()
    if one == other or one in other.parents or (other in one.parents and other.is_dir()):
        found = "one inside the other" if one != other else "the same"
        raise ConfigError(Problem(f"{target}", "a place apart from the source", found, "Choose another target."))


def _describe_job(source: Reader, to: str, options: WriteOptions) -> dict:
    """What must be the same for two runs to be one conversion."""
    asked = {name: str(value) for name, value in asdict(options).items() if name != "workers"}
    fingerprint = source.fingerprint()
    if fingerprint is None:
        # Nothing tells us that a second run reads the same: it never goes on from the first.
        fingerprint = uuid.uuid4().hex
    path = str(source.path.resolve()) if source.path else None
    origin = {"format": source.format, "path": path, "fingerprint": fingerprint, "dims": source.model_config.to_json()}
    return {"version": VERSION, "source": origin, "to": to, "options": asked, "moments": MOMENTS}


def _find_finished(target: Path, job: str, overwrite: bool) -> Manifest | None:
    """The manifest of a target that the same request wrote; None if the place is free (or may be taken)."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    hint = "Choose another target, or remove it."
    if not target.is_dir():
        raise CheckpointError(Problem(f"{target}", "a place for a new folder", "a file", hint))
    try:
        manifest = load_manifest(target)
    except CheckpointError:
        raise CheckpointError(Problem(f"{target}", "a place for a new folder", "a folder of others", hint)) from None
    if manifest.job == job and _file_sizes(target) == manifest.files:
        return manifest
    if not overwrite:
        hint = "Choose another target, or say --overwrite."
        raise CheckpointError(Problem(f"{target}", "a place for a new folder", "another conversion", hint))
    return None


def _file_sizes(folder: Path) -> dict[str, int]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(files) if f.name != MANIFEST}

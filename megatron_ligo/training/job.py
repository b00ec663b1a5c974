"""The base of fits and pretraining runs: mesh, exclusive output folder, resumption, recorded settings."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import IO, ClassVar

from megatron_ligo.common import folder_kinds
from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.common.file_lock import lock_folder
from megatron_ligo.common.folder_kinds import FolderKind
from megatron_ligo.config.run_config import SCRATCH, RunConfig, TrainingSection
from megatron_ligo.data.sampler import Batch, ShardedSampler
from megatron_ligo.distributed import device, mesh
from megatron_ligo.distributed.mesh import Mesh, all_ranks
from megatron_ligo.training import loop
from megatron_ligo.training.checkpointing import reshard, run_checkpoints
from megatron_ligo.training.engine import Engine, count_micro_batches
from megatron_ligo.training.guard import stop_record
from megatron_ligo.training.metrics import peak_memory_bytes

log = logging.getLogger(__name__)

# Keys that may change between a run and its resumption: results depend on none of them, except for rounding.
CHANGEABLE_KEYS = (
    "save_every", "keep_last", "timeout_minutes", "grace_seconds", "bad_numbers", "spike", "check_replicas_every",
    "parallel", "micro_batch_size", "recompute", "source",
)  # fmt: skip

# Locks are held until the process ends.
_output_locks: dict[Path, IO[str]] = {}


class TrainingJob:
    """A job of all ranks that trains one model from a config section and resumes from its own checkpoints.

    A subclass opens `data` and builds `engine`. Every method is collective over all ranks.
    """

    folder_kind: ClassVar[FolderKind]
    mesh: Mesh
    data: ShardedSampler
    engine: Engine

    def __init__(
        self, config: RunConfig, section: TrainingSection, output: Path, *, resume_after_anomaly: bool = False
    ):
        """resume_after_anomaly: accepts the anomaly at which the run in OUTPUT has stopped."""
        self.config, self.section, self.output = config, section, output
        self.resume_after_anomaly = resume_after_anomaly
        mesh.init_distributed(section.timeout_minutes)
        self.ranks = all_ranks()
        self.dtype = self.ranks.run_on_all(lambda: device.resolve_dtype(section.precision))

    def open_output(self) -> None:
        """Builds the mesh, locks OUTPUT if it exists, and finds its newest checkpoint.

        layout_changed: the checkpoint was written at another layout, so its tensors must be resharded. accepted_step:
        the last step with an anomaly that the user has accepted. NumbersError if the run has stopped at another one.
        """
        self.mesh = mesh.build_mesh(self.section.parallel.tp, self.section.parallel.pp)
        self.micro_batches = self.ranks.run_on_all(lambda: count_micro_batches(self.section, self.mesh))
        self.ranks.run_on_all(lambda: folder_kinds.check_output(self.output, self.folder_kind))
        lock_output(self.output)
        self.accepted_step = self._check_stops()
        self.checkpoint = run_checkpoints.find_newest(self.output / loop.CHECKPOINTS_FOLDER)
        self.layout_changed = reshard.layout_changed(self.checkpoint, self.section, self.mesh)

    def _check_stops(self) -> int:
        with self.ranks.agree():
            is_first = self.ranks.rank == 0
            stops = stop_record.check_stops(self.output, self.resume_after_anomaly) if is_first else []
        return max((stop.step for stop in self.ranks.all_gather(stops)[0] if stop.accepted), default=0)

    def load_checkpoint(self) -> dict:
        """Loads the checkpoint, unless its weights were resharded into the engine; returns the run's state."""
        if not self.layout_changed:
            run_checkpoints.load(self.engine, self.checkpoint)
        log.info("resumed after step %d", self.engine.steps)
        return self.checkpoint.state

    def eval_batches(self, samples: int) -> list[Batch]:
        """Returns this rank's micro-batches of the first held-out samples."""
        return self.data.eval_batch(samples, self.section.micro_batch_size, self.mesh.dp, self.mesh.dp_rank)

    def peak_memory_of_ranks(self) -> list[int]:
        """Returns the peak memory of every rank, in bytes."""
        return self.ranks.all_gather(peak_memory_bytes())


def run_identity(config: RunConfig, section: str, model_sections: Iterable[str]) -> dict:
    """Returns every setting that the results depend on, without the layout, as JSON values.

    section: "fit" or "pretrain". model_sections: the sections that define the model.
    """
    tables = config.to_dict()
    training = {key: value for key, value in tables[section].items() if key not in CHANGEABLE_KEYS}
    data = {key: value for key, value in tables["data"].items() if key != "cache"}
    return {name: tables[name] for name in model_sections} | {section: training, "data": data}


def check_same_run(saved: dict, current: dict, output: Path) -> None:
    """Raises ConfigError with every setting that differs from those of the run to resume."""
    errors = ErrorCollector(f"{output} holds a run with other settings", ConfigError)
    before, after, defaults = _flatten(saved), _flatten(current), _flatten(RunConfig().to_dict())
    if before.get("pretrain.start") == "":
        # Before scratch had a name, it had none.
        before["pretrain.start"] = SCRATCH
    for key in sorted(before.keys() | after.keys()):
        # A setting added after the run was written had its default value.
        expected = before.get(key, defaults.get(key))
        if expected != after.get(key):
            errors.add(key, expected, after.get(key), "Resume with the same, or choose another --output.")
    errors.raise_if_any()


def _flatten(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def lock_output(output: Path, create: bool = False) -> None:
    """Locks a run's folder until this process ends. ConfigError on all ranks if another run holds the lock.

    Does nothing if the folder is missing, unless `create` is set. Collective.
    """
    all_ranks().run_on_rank_0(lambda: _lock_output(output.resolve(), create))


def _lock_output(folder: Path, create: bool) -> None:
    if create:
        folder.mkdir(parents=True, exist_ok=True)
    if folder not in _output_locks and folder.is_dir():
        _output_locks[folder] = lock_folder(folder)

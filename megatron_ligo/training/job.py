"""The base of fits and pretraining runs: mesh, exclusive output folder, resumption, recorded settings."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, ClassVar

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common import folder_kinds, library_log
from megatron_ligo.common.errors import Problem
from megatron_ligo.common.file_lock import lock_folder
from megatron_ligo.common.folder_kinds import FolderKind
from megatron_ligo.config.run_config import RunConfig, TrainingSection
from megatron_ligo.config.run_identity import check_same_run
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.data.tokenizer import choose_tokenizers
from megatron_ligo.distributed import device, mesh
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.distributed.mesh import Mesh, all_ranks
from megatron_ligo.export import run_inputs
from megatron_ligo.export.metrics_rows import find_changed_rows
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, InputPolicy, RunInputs
from megatron_ligo.growth.codes.codes_file import TENSORS
from megatron_ligo.models.mcore.router_statistics import RouterStatistics
from megatron_ligo.training import loop
from megatron_ligo.training.checkpointing import reshard, run_checkpoints
from megatron_ligo.training.deepspeed_profile import bound_values, read_profile
from megatron_ligo.training.engine import Engine, count_micro_batches
from megatron_ligo.training.guard import stop_record
from megatron_ligo.training.metrics import StepCallback, peak_memory_bytes
from megatron_ligo.training.tracking.trackers import check_trackers

log = logging.getLogger(__name__)

# Where digests are kept if the folder of a file is read-only.
DIGESTS_FOLDER = ".digests"
HELD_OUT, SAMPLE_ORDER = "held-out samples", "sample order"

# Locks are held until the process ends.
_output_locks: dict[Path, IO[str]] = {}

# Held-out samples that tell how far losses lie apart. Every rank reads all of them.
DEVIATION_SAMPLES = 32


class TrainingJob:
    """A job of all ranks that trains one model from a config section and resumes from its own checkpoints.

    A subclass opens `data` and builds `engine`. Every method is collective over all ranks.
    """

    folder_kind: ClassVar[FolderKind]
    reads_images = False
    on_step: StepCallback | None = None
    routers: RouterStatistics | None = None
    mesh: Mesh
    data: ShardedSampler
    inputs: RunInputs
    engine: Engine

    def __init__(
        self,
        config: RunConfig,
        section: TrainingSection,
        output: Path,
        *,
        resume_after_anomaly: bool = False,
        policy: InputPolicy = DEFAULT_POLICY,
    ):
        """resume_after_anomaly: accepts the anomaly at which the run in OUTPUT has stopped."""
        self.policy = policy
        self.config, self.section, self.output = config, section, output
        self.resume_after_anomaly = resume_after_anomaly
        check_trackers(section.trackers)
        mesh.init_distributed(section.timeout_minutes)
        self.ranks = all_ranks()
        self.dtype = self.ranks.run_on_all(lambda: device.resolve_dtype(section.precision))

    def open_output(self) -> None:
        """Builds the mesh, locks OUTPUT if it exists, and finds its newest checkpoint.

        layout_changed: the checkpoint was written at another layout, so its tensors must be resharded. accepted_step:
        the last step with an anomaly that the user has accepted. NumbersError if the run has stopped at another one.
        """
        parallel = self.section.parallel
        self.mesh = mesh.build_mesh(parallel.tp, parallel.pp, parallel.ep, parallel.cp)
        self.micro_batches = self.ranks.run_on_all(lambda: count_micro_batches(self.section, self.mesh))
        self.ranks.run_on_all(lambda: folder_kinds.check_output(self.output, self.folder_kind))
        lock_output(self.output)
        self.accepted_step = self._check_stops()
        self.checkpoint = run_checkpoints.find_newest(self.output / loop.CHECKPOINTS_FOLDER)
        self.layout_changed = reshard.layout_changed(self.checkpoint, self.section, self.engine_mesh)

    def _check_stops(self) -> int:
        with self.ranks.agree():
            is_first = self.ranks.rank == 0
            stops = stop_record.check_stops(self.output, self.resume_after_anomaly) if is_first else []
        return max((stop.step for stop in self.ranks.all_gather(stops)[0] if stop.accepted), default=0)

    @property
    def engine_mesh(self) -> Mesh:
        """The mesh of the engine's parameters."""
        return self.mesh

    @property
    def resumed_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def check_settings(self, saved: dict, current: dict) -> None:
        """Raises ConfigError unless the run to resume has these settings."""
        by_content = self.checkpoint.version > 2
        self.ranks.run_on_all(lambda: check_same_run(saved, current, self.output, by_content))

    def open_inputs(self, held_out_digest: Callable[[dict], str | None]) -> RunInputs:
        """Returns the still empty inputs of this run, to be compared with those of the checkpoint.

        A checkpoint of a version without inputs is taken as it is, except for its held-out samples, whose digest
        `held_out_digest` finds in its state.
        """
        cache = DigestCache(self.ranks, self.output / DIGESTS_FOLDER, self.policy.full_check)
        if not self.checkpoint:
            return RunInputs(cache, self.policy, None)
        state, folder = self.checkpoint.state, self.checkpoint.folder
        if self.checkpoint.version > 2:
            inputs = RunInputs(cache, self.policy, self.ranks.run_on_all(lambda: run_inputs.read_saved(state, folder)))
            inputs.add_problems(self._find_changed_rows())
            return inputs
        log.warning("%s is of an earlier version, without digests: data and models are taken as they are", folder)
        digest = held_out_digest(state)
        entry = {"path": "data.valid", "kind": run_inputs.SAMPLES, "digest": digest}
        return RunInputs(cache, self.policy, {HELD_OUT: entry} if digest else {}, adopted=True)

    def _find_changed_rows(self) -> list[Problem]:
        """Returns a problem if the metrics up to the checkpoint are not those that it was saved with."""
        with self.ranks.agree():
            is_first, saved = self.ranks.rank == 0, self.checkpoint
            problems = find_changed_rows(self.output, saved.state, saved.step) if is_first else []
        return self.ranks.all_gather(problems)[0]

    def compare_inputs(self, complete: bool = True) -> None:
        """Compares the inputs that are there by now with the checkpoint's. DataError on all ranks if any differs."""
        self.ranks.run_on_all(lambda: self.inputs.check(self.resumed_step, complete))

    def find_tokenizers(self, model_files: Sequence[Path]) -> tuple[Path, ...]:
        """Returns the tokenizers that the data may be of. A run of an earlier version was not held to the model's."""
        files = () if self.inputs.adopted else model_files
        return self.ranks.run_on_all(lambda: choose_tokenizers(self.config.data.tokenizer, files))

    def add_data_files(self, inputs: RunInputs, tokenizers: Sequence[Path], codes: str) -> None:
        """Adds the files of [data], the tokenizer's and those of token codes (a folder, or "") to the inputs."""
        data = self.config.data
        files = {f"tokenizer: {path.name}": path for path in tokenizers}
        suffixes = ("",) if self.reads_images else (".bin", ".idx")
        for split, entries in (("train", data.train), ("valid", data.valid)):
            for number, prefix in enumerate((entry for entry in entries if isinstance(entry, str)), 1):
                files |= {f"data.{split} {number}{suffix}": Path(f"{prefix}{suffix}") for suffix in suffixes}
        parallel = self.section.parallel
        bound = bound_values(self.ranks.run_on_all(lambda: read_profile(parallel)))
        if bound:
            inputs.add_values("parallel.ds_config", parallel.ds_config, bound)
        inputs.add_files(files | ({"token codes": Path(codes) / TENSORS} if codes else {}))

    def add_samples(self, inputs: RunInputs, held_out_digest: str | None) -> None:
        """Adds what the data files give: the order of the samples, and the held-out samples of evaluations."""
        output = self.output.resolve()
        for name, (folder, digest) in self.data.index_digests.items():
            # The bytes of a checkpoint do not depend on where the run is.
            folder = folder.relative_to(output) if folder.is_relative_to(output) else folder
            inputs.add_digest(f"{SAMPLE_ORDER} of {name}", f"{folder}", run_inputs.INDICES, digest)
        if held_out_digest:
            inputs.add_digest(HELD_OUT, "data.valid", run_inputs.SAMPLES, held_out_digest)

    def load_checkpoint(self) -> dict:
        """Loads the checkpoint, unless its weights were resharded into the engine; returns the run's state."""
        if not self.layout_changed:
            run_checkpoints.load(self.engine, self.checkpoint)
        log.info("resumed after step %d", self.engine.steps)
        return self.checkpoint.state

    def watch_routers(self, model_config: ModelConfig) -> None:
        """Counts what the engine's routers choose, if the model has experts."""
        if model_config.num_experts:
            self.routers = RouterStatistics(self.engine.module, model_config)

    def take_routing(self) -> dict[str, float]:
        """Returns the routers' columns of metrics.jsonl for the last step; none without experts."""
        return self.routers.take() if self.routers else {}

    def mean_on_held_out(self, samples: int) -> float:
        """Returns the mean loss (or accuracy) on the first held-out samples, at any number of ranks."""
        parts = self.data.eval_parts(samples, self.section.micro_batch_size, self.mesh.dp, self.mesh.dp_rank)
        means = [(count, self.engine.evaluate(batches)) for count, batches in parts]
        # One part keeps its bits.
        return means[0][1] if len(means) == 1 else sum(count * mean for count, mean in means) / samples

    def losses_on_held_out(self, samples: int) -> list[float]:
        """Returns the loss on each of the first held-out samples, at any number of ranks. Every rank reads all."""
        size = 1 if self.engine.is_pipeline else self.section.micro_batch_size
        ranges = (range(first, min(first + size, samples)) for first in range(0, samples, size))
        batches = (self.data.held_out_batch(indices) for indices in ranges)
        if self.engine.is_pipeline:
            return [self.engine.evaluate([batch]) for batch in batches]
        return [loss for batch in batches for loss in self.engine.evaluate_samples(batch)]

    def deviation_on_held_out(self, samples: int) -> float | None:
        """Returns the standard deviation of the loss over the first held-out samples; None of a single one."""
        losses = self.losses_on_held_out(min(samples, DEVIATION_SAMPLES))
        return statistics.stdev(losses) if len(losses) > 1 else None

    def peak_memory_of_ranks(self) -> list[int]:
        """Returns the peak memory of every rank, in bytes."""
        return self.ranks.all_gather(peak_memory_bytes())


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
        library_log.write_to(folder)

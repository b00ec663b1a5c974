"""Pretrains a Megatron-core model in a DeepSpeed engine, at any layout, from a hand-off, a checkpoint or scratch."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ligo import arch as architectures
from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.common import folder_kinds
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.run_config import SCRATCH, PretrainSection, RunConfig
from megatron_ligo.config.run_identity import run_identity
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.export import run_inputs
from megatron_ligo.export.pretrain_record import read_pretrain_record, write_pretrain_record
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, SMALL_MODEL, InputPolicy
from megatron_ligo.export.start_check import find_start_damage
from megatron_ligo.models.full import parameters, universal_loading
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.training import job_summary, loop, run_extension
from megatron_ligo.training.checkpointing import reshard
from megatron_ligo.training.deepspeed_profile import GRADIENT_SUMS, note_gradient_sums, offloads_weights
from megatron_ligo.training.engine import Engine, build_parameter_groups
from megatron_ligo.training.initial_weights import (
    InitialWeights,
    check_layout,
    find_initial_weights,
    open_start,
    read_small_config,
)
from megatron_ligo.training.job import TrainingJob, lock_output
from megatron_ligo.training.lr_schedule import schedule_after_growth

log = logging.getLogger(__name__)

# The model's config and its tokenizer, copied into every checkpoint of the run.
MODEL_FOLDER = "model"


class Pretrain(TrainingJob):
    """One pretraining run, from its config to its last checkpoint. `run` executes it. Collective over all ranks."""

    folder_kind = folder_kinds.PRETRAINING
    # The steps that the run had and gets, if it is extended.
    extension: dict | None = None
    section: PretrainSection

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        *,
        resume_after_anomaly: bool = False,
        policy: InputPolicy = DEFAULT_POLICY,
    ):
        super().__init__(config, config.pretrain, output, resume_after_anomaly=resume_after_anomaly, policy=policy)
        self.open_output()
        model_sections = ("small", "large") if self.section.start == SCRATCH else ()
        self.identity = run_identity(config, "pretrain", model_sections)
        if self.checkpoint:
            record = self.ranks.run_on_all(lambda: read_pretrain_record(output))
            self.extension = run_extension.read_extension(record["run"], self.identity)
            saved, current = record["run"], self.identity
            if self.extension:
                saved, current = run_extension.without_steps(saved), run_extension.without_steps(current)
            self.check_settings(saved, current)
            self.start = self.ranks.run_on_all(lambda: self._resumed_start(record))
        else:
            self.start = self.ranks.run_on_all(lambda: find_initial_weights(config))
        self.model_config: ModelConfig = self.start.model_config
        self.grown = self.start.grown
        lock_output(output, create=True)
        self.reads_images = architectures.get(self.model_config.arch).reads_images
        self.inputs = self.open_inputs(lambda state: state["eval"] and state["eval"]["digest"])
        self._check_files()
        self.data = self._open_data()
        self._check_samples()
        self.engine = self._build_engine()
        self.watch_routers(self.model_config)

    def run(self) -> dict:
        """Trains, from the newest checkpoint if there is one; returns the content of OUTPUT/pretrain.json."""
        if self.checkpoint:
            state = self.load_checkpoint()
            self.inputs.save_to(state)
            note_gradient_sums(state, self.engine.steps, self.engine.gradient_sums, self.dtype is torch.bfloat16)
            if self.extension:
                self._extend(state)
            elif self.inputs.accepted:
                self._write_record(state)
        else:
            state = self._initial_state()
            self.inputs.save_to(state)
            note_gradient_sums(state, self.engine.steps, self.engine.gradient_sums, self.dtype is torch.bfloat16)
            self.ranks.run_on_rank_0(self._write_model_folder)
            self._write_record(state)
            if self.config.data.valid:
                self._evaluate_start(state)
        self._train(state)
        return self._write_record(state)

    def losses_by_sample(self) -> list[float]:
        """Returns the loss on each held-out sample; call it after `run`. Collective."""
        return self.losses_on_held_out(self.section.eval_samples)

    def _extend(self, state: dict) -> None:
        """Records that the run gets more steps than it was started with."""
        section = schedule_after_growth(self.section) if self.grown else self.section
        log.warning("%s", run_extension.describe_extension(self.extension, section, self.engine.steps))
        state.setdefault("extensions", []).append({**self.extension, "step": self.engine.steps})
        state["losses"].pop("end", None)
        self._write_record(state)

    def _initial_state(self) -> dict:
        held_out, samples = None, self.section.eval_samples
        if self.config.data.valid:
            held_out = {"samples": samples, "digest": self.eval_digest, "opened": self._held_out_samples()}
        return {
            model_record.RUN_STATE_CONTENT: "model",
            "losses": {},
            "eval": held_out,
            "origin": self.start.origin,
        }

    def _check_files(self) -> None:
        """Compares the start and the data files with those of the run that is resumed. Checks a new run's start."""
        start, path = self.start, self.section.start
        files: Sequence[Path] = ()
        if path == SCRATCH:
            small = Path(self.config.small.path)
            sizes = self.ranks.run_on_all(lambda: read_small_config(self.config))
            self.inputs.add_sizes(SMALL_MODEL, f"{small}", sizes, self.config.small.accept)
            files = model_record.find_carried_files(small) if small.is_dir() else ()
        else:
            if self.checkpoint:
                start = self._reopen_start()
            if start is None:
                files = model_record.find_carried_files(self.output / MODEL_FOLDER)
            else:
                self.inputs.add_problems(find_start_damage(Path(path), start.source, self.inputs.cache))
                self.inputs.add_model("pretrain.start", path, start.source, moments=start.source.has_moments)
                files = start.source.files
        # Kept from here, because the source is released once the engine has its weights.
        self.carried_files = files
        self.carried_keys = start.source.carried if start is not None and start.source else {}
        self.tokenizers = self.find_tokenizers(files)
        self.add_data_files(self.inputs, self.tokenizers, self.section.codes)
        self.compare_inputs(complete=False)

    def _reopen_start(self) -> InitialWeights | None:
        """Returns the start of the run that is resumed; None if it has been removed, which its numbers survive."""
        path = self.section.start
        if not self.ranks.run_on_all(lambda: Path(path).exists()):
            recorded = (self.inputs.saved or {}).get("pretrain.start: weights", {"path": path})
            if recorded["path"] == path:
                self.inputs.keep_saved("pretrain.start", "it is no longer there")
                return None
        return self.ranks.run_on_all(lambda: open_start(Path(path)))

    def _check_samples(self) -> None:
        samples = self.section.eval_samples
        self.eval_digest = self.data.eval_digest(samples) if self.config.data.valid else None
        self.add_samples(self.inputs, self.eval_digest)
        self.compare_inputs()

    def _measure(self, samples: int) -> dict[str, float]:
        """Returns the loss on the first held-out samples and, for a classifier, the accuracy."""
        metrics = {"loss": self.mean_on_held_out(samples)}
        if architectures.get(self.model_config.arch).reads_images:
            with self.engine.module.measuring_accuracy():
                metrics["accuracy"] = self.mean_on_held_out(samples)
        return metrics

    def _evaluate_start(self, state: dict) -> None:
        """Measures the loss at step 0 and, if the start comes from a fit, compares it with the fit's last loss."""
        metrics = self._measure(self.section.eval_samples)
        state["losses"]["start"] = metrics["loss"]
        if not self.section.steps:
            state["deviation"] = self.deviation_on_held_out(self.section.eval_samples)
        log.info("at step 0: %s", _format_metrics(metrics))
        if "accuracy" in metrics:
            state["accuracy"] = {"start": metrics["accuracy"]}
        if self.start.fit_record is not None:
            self._compare_with_fit(self.start.fit_record, state["losses"])

    def _compare_with_fit(self, fit: dict, losses: dict[str, float]) -> None:
        if fit.get("lagged"):
            log.info("the fit's losses are those after its lag: none of them is the loss of this start")
            return
        samples = fit["eval"]["samples"]
        if self.data.eval_digest(samples) != fit["eval"]["digest"]:
            log.warning("the fit evaluated other held-out samples than these: its last loss cannot be compared")
            return
        same_batch = samples == self.section.eval_samples
        start = losses["start"] if same_batch else self.mean_on_held_out(samples)
        losses["fit"] = fit["losses"]["end"]
        losses["start_on_fit_batch"] = start
        gap = start - losses["fit"]
        log.info("on the fit's batch: %.6f; at the end of the fit: %.6f; difference %+.1e", start, losses["fit"], gap)

    def _train(self, state: dict) -> None:
        section, length = self.section, self.model_config.tokens_per_sample(self.config.data.seq_length)
        if self.grown:
            section = schedule_after_growth(section)
            message = "from a grown model: peak rate %.3g = lr x grown_peak, %d steps of warm-up"
            log.info(message, section.lr, section.warmup_steps)
        tokens = section.global_batch_size * length
        flops = train_flops(self.model_config, tokens, length)
        place = (self.mesh.dims, self.engine.steps)
        summary = job_summary.describe_job(self._start_text(), self.model_config, section, *place, tokens, flops)
        log.info("pretraining in %s:\n%s", self.output, summary)
        loop.run_steps(
            self.engine,
            self.data,
            section,
            self.output,
            state,
            tokens,
            flops,
            math.log(self.model_config.vocab_size),
            self.accepted_step,
            after_step=lambda step: self.take_routing() | self._evaluate_if_due(step, state),
            extra_files=self.output / MODEL_FOLDER,
            on_step=self.on_step,
            start_loss=state["losses"].get("start"),
        )

    def _start_text(self) -> str:
        if self.checkpoint:
            return f"the checkpoint of step {self.checkpoint.step} of this run"
        if self.section.start == SCRATCH:
            return f"scratch: fresh weights of seed {self.section.seed}"
        return f"{self.section.start} ({'a hand-off' if self.grown else 'a checkpoint'})"

    def _evaluate_if_due(self, step: int, state: dict) -> dict[str, float]:
        is_last = step == self.section.steps
        if not self.config.data.valid or not (is_last or loop.is_due(step, self.section.eval_every)):
            return {}
        metrics = self._measure(self.section.eval_samples)
        if is_last:
            state["losses"]["end"] = metrics["loss"]
            state["deviation"] = self.deviation_on_held_out(self.section.eval_samples)
            log.info("after step %d: %s", step, _format_metrics(metrics))
            if "accuracy" in metrics:
                state["accuracy"]["end"] = metrics["accuracy"]
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _build_engine(self) -> Engine:
        """Builds the engine and its weights. A run resumed at the same layout loads its checkpoint afterwards."""
        section, start = self.section, self.start
        sequence_parallel = section.parallel.sequence_parallel
        build = BuildOptions(self.dtype, self.mesh.tp, sequence_parallel, section.router_aux_loss, self.mesh.ep)
        # Weights that are not filled below must still be equal on all replicas.
        torch.manual_seed(section.seed)
        # What DeepSpeed loads itself is loaded into whole weights, and offloaded weights are on the host.
        offloads = offloads_weights(section.parallel)
        divided = section.parallel.zero == 3 and not start.universal and not offloads
        model = build_model(self.model_config, build, self.mesh, section.recompute, divided)
        read = start.reader(section.seed)
        fills_weights = not start.universal and (not self.checkpoint or self.layout_changed)
        if fills_weights:
            parameters.fill_parameters(model, self.model_config, self.mesh, read)
        if start.universal and universal_loading.needs_preparation(self.model_config, section.parallel.zero):
            universal_loading.prepare_for_universal(model, self.model_config, self.mesh.tp_group)
        trained = parameters.find_head_parameters(model, self.model_config) if section.fresh_head else None
        groups = build_parameter_groups(model, section.weight_decay, trained)
        bf16 = self.dtype is torch.bfloat16
        engine = Engine(model, self.mesh, section, groups, bf16, universal=start.universal)
        if start.universal:
            universal_loading.load_universal(engine.engine, start.source, self.mesh.tp_group)
            # The run's own steps begin at 0; Adam's step count continues from the checkpoint.
            engine.set_step(0)
        elif fills_weights and (bf16 or self.layout_changed):
            steps = start.source.step if self.layout_changed and start.source.has_moments else None
            read_part = reshard.model_part_reader(model, self.model_config, read, self.mesh)
            reshard.fill_optimizer(engine.engine, read_part, steps)
            engine.set_step(self.checkpoint.step if self.layout_changed else 0)
        # Releases the source's memory-mapped files.
        self.start = replace(start, source=None)
        return engine

    def _open_data(self) -> ShardedSampler:
        data, section = self.config.data, self.section
        if not data.valid and not section.steps:
            hint = "Without steps the run only evaluates: set data.valid."
            raise ConfigError(Problem("data.valid", "held-out data", "none", hint))
        samples = section.steps * section.global_batch_size
        held_out = self._held_out_samples() if data.valid else 0
        return open_dataset(
            data, self.model_config, samples, held_out, self.output, section.first_sample, self.tokenizers
        )

    def _held_out_samples(self) -> int:
        """Returns how many held-out samples the run may read: those of the fit behind its start too."""
        if self.checkpoint:
            return (self.checkpoint.state["eval"] or {}).get("opened", self.section.eval_samples)
        fit_samples = self.start.fit_record["eval"]["samples"] if self.start.fit_record else 0
        return max(self.section.eval_samples, fit_samples)

    def _resumed_start(self, record: dict) -> InitialWeights:
        """Returns the start of the run resumed from OUTPUT: the checkpoint's weights, opened only to be resharded."""
        model_config = ModelConfig.from_json(record["dims"])
        check_layout(model_config, self.section.parallel, model_config.tokens_per_sample(self.config.data.seq_length))
        source = formats.open(self.checkpoint.folder) if self.layout_changed else None
        return InitialWeights(model_config, source, grown=record["grown"])

    def _write_record(self, state: dict) -> dict:
        """Writes OUTPUT/pretrain.json and returns its content. Collective."""
        record = {
            "run": self.identity,
            "dims": self.model_config.to_json(),
            "grown": self.grown,
            "step": self.engine.steps,
            "losses": state["losses"],
            "deviation": state.get("deviation"),
            "accuracy": state.get("accuracy"),
            "extensions": state.get("extensions", []),
            "eval": state["eval"],
            run_inputs.INPUTS: state[run_inputs.INPUTS],
            run_inputs.ACCEPTED: state.get(run_inputs.ACCEPTED, []),
            "layout": self.engine.layout.to_json(),
            GRADIENT_SUMS: state[GRADIENT_SUMS],
            "peak_memory_bytes": self.peak_memory_of_ranks(),
            "versions": library_versions(),
        }
        self.ranks.run_on_rank_0(lambda: write_pretrain_record(self.output, record))
        return record

    def _write_model_folder(self) -> None:
        model_record.write_folder(self.output / MODEL_FOLDER, self.model_config, self.carried_keys, self.carried_files)


def _format_metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6f}" for name, value in metrics.items())

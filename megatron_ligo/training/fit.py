"""Fits the growth operator to the training loss at any parallel layout; the small model stays frozen."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.content import digest_weights
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common import folder_kinds
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import FitSection, RunConfig
from megatron_ligo.config.run_identity import run_identity
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.export import run_inputs
from megatron_ligo.export.mixture_reader import as_mixture_reader
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, SMALL_MODEL, InputPolicy
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.experts import check_copies_of_ranks
from megatron_ligo.growth.methods import describe_method
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator, check_factored
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel, FactoredPipeline
from megatron_ligo.models.factored.fit_flops import fit_step_flops
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.factored.teacher import Teacher
from megatron_ligo.models.mcore.layer_spec import check_supported
from megatron_ligo.sharding.tensor_parallel import check_tp
from megatron_ligo.training import job_summary, loop
from megatron_ligo.training.best_operator import BestOperator
from megatron_ligo.training.checkpointing import reshard
from megatron_ligo.training.checkpointing.gather_operator import gather_operator
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.initial_weights import check_cp, check_layout
from megatron_ligo.training.job import TrainingJob, lock_output
from megatron_ligo.training.lag import Lag, open_lag

log = logging.getLogger(__name__)


class Fit(TrainingJob):
    """One fit, from its config to OUTPUT/operator. `run` executes it. Collective over all ranks."""

    folder_kind = folder_kinds.FIT
    section: FitSection

    def __init__(
        self,
        config: RunConfig,
        output: Path,
        *,
        resume_after_anomaly: bool = False,
        policy: InputPolicy = DEFAULT_POLICY,
    ):
        super().__init__(config, config.fit, output, resume_after_anomaly=resume_after_anomaly, policy=policy)
        self.reader, self.operator, self.lag = self.ranks.run_on_all(lambda: prepare_fit(config))
        self.sample_tokens = self.operator.large.tokens_per_sample(config.data.seq_length)
        self.step_tokens = self.section.global_batch_size * self.sample_tokens
        distilled, lagged = self.section.distill > 0, self.lag is not None
        self.step_flops = fit_step_flops(self.operator, self.step_tokens, self.sample_tokens, distilled, lagged)
        self.section = self.ranks.run_on_all(lambda: limit_to_budget(self.section, self.step_flops))
        self.open_output()
        torch.manual_seed(self.section.seed)
        self.identity = run_identity(config, "fit", ("small", "large", "operator"))
        if self.checkpoint:
            self.check_settings(self.checkpoint.state["run"], self.identity)
        lock_output(output, create=True)
        self.reads_images = self.operator.arch.reads_images
        self.inputs = self.open_inputs(lambda state: state["digest"])
        self._check_files()
        self.data = self._open_data()
        self._check_samples()
        self.context = self._build_context()
        self.module = FactoredPipeline(self.context) if self.mesh.pp > 1 else FactoredModel(self.context)
        self.engine = self._build_engine()
        self.watch_routers(self.operator.large)

    @property
    def engine_mesh(self) -> Mesh:
        # Expert-parallel ranks divide the computation, and every rank has all maps.
        return self.mesh.without_experts()

    def run(self) -> None:
        """Fits, from the newest checkpoint if there is one, and writes OUTPUT/operator."""
        state = self.load_checkpoint() if self.checkpoint else self._initial_state()
        self.inputs.save_to(state)
        losses = state["losses"]
        if "start" not in losses:
            losses["start"] = self.evaluate()
            log.info("loss of the initialisation: %.6f", losses["start"])
        best = BestOperator(self.section, self.output / "best", state, self._save_operator)
        self._train(state, best)
        if self.engine.steps < self.section.steps or "last" not in losses:
            losses["last"] = self.evaluate()
        log.info("loss after the last step: %.6f", losses["last"])
        best.record_evaluation(self.engine.steps, losses["last"])
        losses["end"] = losses["last"] if self.section.keep == "last" else best.loss
        self._write_operator(losses, state, best)

    def evaluate(self) -> float:
        """Returns the loss on the held-out batch, computed in fp32 whatever the fit's precision."""
        with self.module.step_state.computing_in(torch.float32):
            return self.mean_on_held_out(self.section.eval_samples)

    def _initial_state(self) -> dict:
        return {
            model_record.RUN_STATE_CONTENT: "operator",
            "run": self.identity,
            "losses": {},
            "digest": self.eval_digest,
        }

    def _check_files(self) -> None:
        """Compares the small model, the lag and the data files with those of the run that is resumed."""
        self.inputs.add_model(SMALL_MODEL, self.config.small.path, self.reader)
        if self.lag is not None:
            self.inputs.add_model("fit.lag", self.config.fit.lag, self.lag.trained)
        self.tokenizers = self.find_tokenizers(self.reader.files)
        self.add_data_files(self.inputs, self.tokenizers, self.config.operator.codes)
        self.compare_inputs(complete=False)

    def _check_samples(self) -> None:
        self.eval_digest = self.data.eval_digest(self.section.eval_samples)
        self.add_samples(self.inputs, self.eval_digest)
        self.compare_inputs()

    def _train(self, state: dict, best: BestOperator) -> None:
        def evaluate_if_due(step: int) -> dict[str, float]:
            if step == self.section.steps:
                state["losses"]["last"] = self.evaluate()
                return {"eval_loss": state["losses"]["last"]}
            if not loop.is_due(step, self.section.eval_every):
                return {}
            loss = self.evaluate()
            best.record_evaluation(step, loss)
            return {"eval_loss": loss}

        saved = self.checkpoint
        start = f"the checkpoint of step {saved.step} of this run" if saved else "the initialisation"
        start = f"{start}; {self.operator.settings.method} growth of {self.config.small.path}"
        place = (self.mesh.dims, self.engine.steps, self.step_tokens, self.step_flops)
        summary = job_summary.describe_job(start, self.operator.large, self.section, *place)
        log.info("fit in %s:\n%s", self.output, summary)
        loop.run_steps(
            self.engine,
            self.data,
            self.section,
            self.output,
            state,
            self.step_tokens,
            self.step_flops,
            math.log(self.operator.large.vocab_size),
            self.accepted_step,
            after_step=lambda step: self.take_routing() | evaluate_if_due(step),
            should_stop=best.should_stop,
            on_step=self.on_step,
            start_loss=state["losses"]["start"],
        )

    def _build_engine(self) -> Engine:
        """Builds the engine and, if the layout has changed, fills it with the checkpoint's resharded tensors."""
        saved = self.ranks.run_on_all(lambda: reshard.SavedOptimizer(self.checkpoint)) if self.layout_changed else None
        if saved:
            self.ranks.run_on_all(lambda: reshard.fill_module(self.module, saved.part_reader(self.mesh)))
        mark_updated = self.module.step_state.mark_updated
        engine = Engine(
            self.module, self.engine_mesh, self.section, self._parameter_groups(), after_update=mark_updated
        )
        if saved:
            reshard.fill_optimizer(engine.engine, saved.part_reader(self.mesh), saved.steps)
            engine.set_step(self.checkpoint.step)
        return engine

    def _parameter_groups(self) -> list[dict]:
        """Returns the optimizer's groups: width maps and depth maps, each at its own learning rate."""
        section = self.section
        ratio = 1.0 if section.depth_lr is None else section.depth_lr / section.lr
        width, depth = [], []
        for name, parameter in self.module.named_parameters():
            (depth if ".depth." in f".{name}" else width).append(parameter)
        return [
            {"params": width, "lr_scale": 1.0, "weight_decay": section.weight_decay},
            {"params": depth, "lr_scale": ratio, "weight_decay": section.weight_decay},
        ]

    def _open_data(self) -> ShardedSampler:
        section = self.section
        samples = section.steps * section.global_batch_size
        held_out, tokenizers = section.eval_samples, self.tokenizers
        large = self.operator.large
        return open_dataset(self.config.data, large, samples, held_out, self.output, tokenizers=tokenizers)

    def _build_context(self) -> FactoredContext:
        section = self.section
        # ZeRO 3 frees the tensors built from the operator after every micro-batch.
        micro_batches = 1 if section.parallel.zero == 3 else self.micro_batches
        reader = self.reader
        if self.operator.large.num_experts:
            reader = as_mixture_reader(reader, self.operator.settings.expert_start)
        return FactoredContext(
            self.operator,
            SmallWeights(self.operator, reader, self.mesh, section.parallel.zero, section.source == "whole"),
            self.mesh,
            self.dtype,
            micro_batches=micro_batches,
            tokens_per_step=micro_batches * section.micro_batch_size * self.sample_tokens // self.mesh.cp,
            recompute=section.recompute,
            sequence_parallel=section.parallel.sequence_parallel,
            gradients_each=section.parallel.zero == 2,
            teacher=self._build_teacher() if section.distill else None,
            lag=self.lag,
            router_aux_loss=section.router_aux_loss,
        )

    def _build_teacher(self) -> Teacher:
        sequence_parallel = self.section.parallel.sequence_parallel
        return Teacher(self.reader, self.mesh, self.dtype, self.section.distill, sequence_parallel)

    def _save_operator(self, folder: Path) -> None:
        """Writes the operator's current state. Collective."""
        tensors = gather_operator(self.module, self.context)
        record = {"source": self._describe_source(), "step": self.engine.steps}
        self.ranks.run_on_rank_0(lambda: operator_file.write_operator(self.operator, tensors.items(), folder, record))

    def _describe_source(self) -> dict:
        digest = digest_weights(self.reader, self.inputs.cache)
        return {"path": Path(self.config.small.path).name, "format": self.reader.format, "digest": digest}

    def _write_operator(self, losses: dict[str, float], state: dict, best: BestOperator) -> None:
        """Writes OUTPUT/operator with the record of the fit. Collective."""
        tensors = self._selected_tensors(best)
        record = {
            "source": self._describe_source(),
            run_inputs.INPUTS: self.inputs.entries,
            run_inputs.ACCEPTED: state.get(run_inputs.ACCEPTED, []),
            "step": self.engine.steps if self.section.keep == "last" else best.step,
            "steps_done": self.engine.steps,
            "losses": losses,
            "eval": {"samples": self.section.eval_samples, "digest": state["digest"]},
            "flops": self.step_flops * self.engine.steps,
            "lagged": self.lag is not None,
            "layout": self.engine.layout.to_json(),
            "peak_memory_bytes": self.peak_memory_of_ranks(),
            "config": self.config.to_dict(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        }
        folder = self.output / "operator"
        self.ranks.run_on_rank_0(lambda: operator_file.write_operator(self.operator, tensors.items(), folder, record))

    def _selected_tensors(self, best: BestOperator) -> Mapping[str, Tensor]:
        """Returns the tensors of the operator to write, on rank 0. Collective."""
        if self.section.keep == "last" or best.step == self.engine.steps:
            return gather_operator(self.module, self.context)
        log.warning("the operator of step %d is kept: its held-out loss was the lowest, %.6f", best.step, best.loss)
        operator = self.operator if best.step == 0 else self.ranks.run_on_all(best.read)
        return {name: operator.tensor(name) for name in operator.shapes()}


def limit_to_budget(section: FitSection, step_flops: float) -> FitSection:
    """Returns the section with at most the steps that max_flops covers. ConfigError if it covers none."""
    if section.max_flops is None:
        return section
    steps = int(section.max_flops // step_flops)
    if not steps:
        raise ConfigError(Problem("fit.max_flops", f"at least one step's {step_flops:.3g}", section.max_flops))
    return replace(section, steps=min(section.steps, steps))


def prepare_fit(config: RunConfig) -> tuple[Reader, Operator, Lag | None]:
    """Opens the small model, the initial operator and, if configured, the lag. LigoError with every problem.

    Needs no process group: `plan` and the tests also call it.
    """
    small = config.small
    if not small.path:
        raise ConfigError("small.path: expected the small model's checkpoint, found nothing. Set it in [small].")
    reader = formats.open_small(small)
    check_supported(reader.model_config)
    operator = build_initial_operator(reader.model_config, config.large, config.operator)
    errors = ErrorCollector("the fit cannot be done", ConfigError)
    check_factored(operator.settings, errors)
    check_expert_fit(operator, config.fit, errors)
    length = operator.large.tokens_per_sample(config.data.seq_length)
    check_teacher(operator, config.fit, length, errors)
    lag = open_lag(config.fit.lag, operator, reader, errors) if config.fit.lag else None
    errors.raise_if_any()
    check_layout(operator.large, config.fit.parallel, length)
    check_copies_of_ranks(operator.small, operator.large, config.fit.parallel)
    counts = operator.count_parameters()
    log.info("%s", describe_method(operator.settings, operator.small, operator.large))
    log.info("%s", job_summary.describe_operator(counts))
    return reader, operator, lag


def check_expert_fit(operator: Operator, section: FitSection, errors: ErrorCollector) -> None:
    """Adds an error for each setting that maps of experts cannot be fitted with."""
    if not operator.large.num_experts:
        return
    if operator.settings.fresh != "none":
        errors.add("operator.fresh", "'none' with experts", repr(operator.settings.fresh), "Choose another method.")
    if section.lag:
        errors.add("fit.lag", "none with experts", section.lag)


def check_teacher(operator: Operator, section: FitSection, seq_length: int, errors: ErrorCollector) -> None:
    """Adds an error for each reason why the small model cannot be the teacher."""
    if not section.distill:
        return
    distill = section.distill
    if section.parallel.pp > 1:
        errors.add("fit.distill", "0 with pipeline stages: the teacher has none", distill, "Set pp = 1.")
    check_tp(operator.small, section.parallel.tp, errors)
    check_cp(operator.small, section.parallel, errors)
    if operator.large.vocab_size != operator.small.vocab_size:
        hint = "The teacher has no logits for the new tokens."
        errors.add("fit.distill", "0 if the vocabulary grows", distill, hint)
    if operator.large.image_size != operator.small.image_size:
        errors.add("fit.distill", "0 if the image grows", distill, "The teacher takes smaller images.")
        return
    longest = operator.small.max_sequence_length
    if operator.arch.has_learned_positions and seq_length > longest:
        hint = f"The teacher has {longest} positions: fit on sequences of that length, then pretrain on longer ones."
        errors.add("fit.distill", f"0 with data.seq_length = {seq_length}", distill, hint)

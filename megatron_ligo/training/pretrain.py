"""Pretraining: DeepSpeed over Megatron-core's modules, at any layout, from a hand-off, a checkpoint or from scratch."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Task
from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.distributed import device, mesh
from megatron_ligo.distributed.mesh import Mesh, all_ranks
from megatron_ligo.models.full import parameters, universal_loading
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.training import loop
from megatron_ligo.training.checkpointing import reshard, run_checkpoints
from megatron_ligo.training.engine import Engine, micro_batches
from megatron_ligo.training.fit import FREE, check_same_run
from megatron_ligo.training.initial_weights import InitialWeights, check_layout, find_initial_weights
from megatron_ligo.training.lr_schedule import after_growth
from megatron_ligo.training.metrics import peak_memory_bytes
from megatron_ligo.training.output_lock import lock_output

log = logging.getLogger(__name__)

RECORD = "pretrain.json"
# What belongs beside every checkpoint of the run: the model's sizes and its tokenizer.
MODEL = "model"


class Pretrain:
    """One run from its config to its last checkpoint; `run` is the whole of it. Collective over all processes."""

    def __init__(self, config: RunConfig, output: Path):
        self.config, self.settings, self.output = config, config.pretrain, output
        mesh.init_distributed(self.settings.timeout_minutes)
        self.ranks = all_ranks()
        self.dtype = self.ranks.run_on_all(lambda: device.resolve_dtype(self.settings.precision))
        self.mesh: Mesh = mesh.build_mesh(self.settings.parallel.tp, self.settings.parallel.pp)
        self.ranks.run_on_all(lambda: micro_batches(self.settings, self.mesh))
        lock_output(output)
        self.found = run_checkpoints.newest(output / loop.FOLDER)
        self.resumed = self.found is not None
        self.moved = reshard.layout_changed(self.found, self.settings, self.mesh)
        self.start = self.ranks.run_on_all(
            self._resumed_start if self.resumed else lambda: find_initial_weights(config)
        )
        self.model_config: ModelConfig = self.start.model_config
        self.grown = self.start.grown
        lock_output(output, make=True)
        self.data = self._open_data()
        self.engine = self._build()

    def run(self) -> dict:
        """Trains, from the last checkpoint if there is one; returns what it writes into OUTPUT/pretrain.json."""
        if self.found:
            state = self.found.state if self.moved else run_checkpoints.load(self.engine, self.found)
            log.info("resumed after step %d", self.engine.steps)
        else:
            state = {
                model_record.RUN_STATE_CONTENT: "model",
                "losses": {},
                "eval": self._held_out(),
                "origin": self.start.origin,
            }
            self.ranks.run_on_rank_0(self._keep_model)
            self._record(state)
            if self.config.data.valid:
                self._evaluate_start(state)
        self._steps(state)
        return self._record(state)

    def evaluate(self, samples: int) -> float:
        """Loss on the first held-out samples."""
        batches = self.data.eval_batch(samples, self.settings.micro_batch_size, self.mesh.dp, self.mesh.dp_rank)
        return self.engine.evaluate(batches)

    def _measure(self, samples: int) -> dict[str, float]:
        """The loss on the first held-out samples, and of a classifier the part of them whose label is told."""
        found = {"loss": self.evaluate(samples)}
        if architectures.get(self.model_config.arch).task is Task.LABEL:
            with self.engine.module.counting_hits():
                found["accuracy"] = self.evaluate(samples)
        return found

    def _held_out(self) -> dict | None:
        """What the losses are measured on; None where nothing is held out."""
        if not self.config.data.valid:
            return None
        samples = self.settings.eval_samples
        return {"samples": samples, "digest": self.data.eval_digest(samples)}

    def _evaluate_start(self, state: dict) -> None:
        losses = state["losses"]
        found = self._measure(self.settings.eval_samples)
        losses["start"] = found["loss"]
        log.info("at step 0: %s", _told(found))
        if "accuracy" in found:
            state["accuracy"] = {"start": found["accuracy"]}
        if self.start.fit is None:
            return
        if self.start.fit.get("lagged"):
            log.info("the fit's losses are those after its lag: none is that of this start")
            return
        found = self.start.fit["eval"]
        same = self._can_deal(found["samples"]) and self.data.eval_digest(found["samples"]) == found["digest"]
        if not same:
            log.warning("the fit evaluated other held-out samples than these: its last loss cannot be compared")
            return
        own = found["samples"] == self.settings.eval_samples
        begun = losses["start"] if own else self.evaluate(found["samples"])
        losses["fit"] = self.start.fit["losses"]["end"]
        losses["start_on_fit_batch"] = begun
        gap = begun - losses["fit"]
        log.info("on the fit's batch: %.6f; at the end of the fit: %.6f; difference %+.1e", begun, losses["fit"], gap)

    def _steps(self, state: dict) -> None:
        run, seq = self.settings, self.model_config.tokens_of_sample(self.config.data.seq_length)
        if self.grown:
            run = after_growth(run)
            log.info(
                "from a grown model: peak rate %.3g = lr x grown_peak, %d steps of warm-up", run.lr, run.warmup_steps
            )
        tokens = run.global_batch_size * seq
        flops = train_flops(self.model_config, tokens, seq)

        def after(step: int) -> dict[str, float]:
            return self._evaluate_if_due(step, state)

        loop.run(self.engine, self.data, run, self.output, state, tokens, flops, after, self.output / MODEL)

    def _evaluate_if_due(self, step: int, state: dict) -> dict[str, float]:
        last = step == self.settings.steps
        if not self.config.data.valid or not (last or loop.due(step, self.settings.eval_every)):
            return {}
        found = self._measure(self.settings.eval_samples)
        if last:
            state["losses"]["end"] = found["loss"]
            log.info("after step %d: %s", step, _told(found))
            if "accuracy" in found:
                state["accuracy"]["end"] = found["accuracy"]
        return {f"eval_{name}": value for name, value in found.items()}

    def _build(self) -> Engine:
        """The engine with its weights; a run that is resumed at its layout gets them from its checkpoint afterwards."""
        run, start = self.settings, self.start
        build = BuildOptions(self.dtype, self.mesh.tp, run.parallel.sequence_parallel)
        # Replicas that are not filled from the table must still agree.
        torch.manual_seed(run.seed)
        model = build_model(self.model_config, build, self.mesh, run.recompute)
        by_deepspeed, at_once = start.universal, not self.resumed or self.moved
        read = start.read(run.seed)
        if not by_deepspeed and at_once:
            parameters.fill(model, self.model_config, self.mesh, read)
        if by_deepspeed and universal_loading.must_prepare(self.model_config, run.parallel.zero):
            universal_loading.prepare_for_universal(model, self.model_config, self.mesh.tp_group)
        trained = head_parameters(model, self.model_config) if run.fresh_head else None
        groups = parameter_groups(model, run.weight_decay, trained)
        engine = Engine(model, self.mesh, run, groups, self._bf16, universal=by_deepspeed)
        if by_deepspeed:
            universal_loading.load_universal(engine.engine, start.source, self.mesh.tp_group)
            # The run's own steps begin at 0; Adam goes on counting where the checkpoint was.
            engine.begin_at(0)
        elif at_once and (self._bf16 or self.moved):
            steps = start.source.step if self.moved and start.source.has_moments else None
            reshard.fill_optimizer(engine.engine, reshard.model_part(model, self.model_config, read, self.mesh), steps)
            engine.begin_at(self.found.step if self.moved else 0)
        # The files that it has mapped are not read again.
        self.start = replace(start, source=None)
        return engine

    @property
    def _bf16(self) -> bool:
        return self.dtype is torch.bfloat16

    def _open_data(self) -> ShardedSampler:
        config, run = self.config.data, self.settings
        held_out = 0
        if config.valid:
            fitted = self.start.fit["eval"]["samples"] if self.start.fit else 0
            held_out = max(run.eval_samples, fitted)
        elif not run.steps:
            hint = "Without steps the run only evaluates: set data.valid."
            raise ConfigError(Problem("data.valid", "held-out data", "none", hint))
        samples = run.steps * run.global_batch_size
        return open_dataset(config, self.model_config, samples, held_out, self.output, run.first_sample)

    def _can_deal(self, samples: int) -> bool:
        return samples % (self.settings.micro_batch_size * self.mesh.dp) == 0

    def _resumed_start(self) -> InitialWeights:
        """The sizes of the run that OUTPUT holds, which must be this one, and its weights if they move to another
        layout; its start is not looked at again."""
        then = _read_record(self.output / RECORD)
        check_same_run(then["run"], self._identity(), self.output)
        model_config = ModelConfig.from_json(then["dims"])
        check_layout(model_config, self.settings.parallel, model_config.tokens_of_sample(self.config.data.seq_length))
        return InitialWeights(
            model_config, formats.open(self.found.folder) if self.moved else None, grown=then["grown"]
        )

    def _identity(self) -> dict:
        """All that the numbers of the run depend on, but for the layout, as plain data."""
        table = self.config.to_dict()
        run = {key: value for key, value in table["pretrain"].items() if key not in FREE}
        data = {key: value for key, value in table["data"].items() if key != "cache"}
        sizes = {} if self.settings.start else {"small": table["small"], "large": table["large"]}
        return {**sizes, "pretrain": run, "data": data}

    def _record(self, state: dict) -> dict:
        memory: list[int] = [0] * self.mesh.world_size
        dist.all_gather_object(memory, peak_memory_bytes())
        made = {
            "run": self._identity(),
            "dims": self.model_config.to_json(),
            "grown": self.grown,
            "step": self.engine.steps,
            "losses": state["losses"],
            "accuracy": state.get("accuracy"),
            "eval": state["eval"],
            "layout": self.engine.layout,
            "peak_memory_bytes": memory,
            "versions": library_versions(),
        }
        self.ranks.run_on_rank_0(lambda: self._write_record(made))
        return made

    def _write_record(self, made: dict) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / RECORD, made)

    def _keep_model(self) -> None:
        source = self.start.source
        model_record.write_folder(
            self.output / MODEL, self.model_config, source.carried if source else {}, source.files if source else ()
        )


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6f}" for name, value in found.items())


def parameter_groups(model: nn.Module, weight_decay: float, trained: set[nn.Parameter] | None = None) -> list[dict]:
    """Matrices with weight decay; norms and biases without. trained: those that are; the others stay as they are."""
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (False, True): []}
    for parameter in model.parameters():
        kind = parameter.dim() > 1, trained is None or parameter in trained
        kinds.setdefault(kind, []).append(parameter)
    return [
        {"params": held, "weight_decay": weight_decay if matrix else 0.0, "lr_scale": 1.0 if moves else 0.0}
        for (matrix, moves), held in kinds.items()
        if held
    ]


def head_parameters(model: nn.Module, model_config: ModelConfig) -> set[nn.Parameter]:
    """Those of the output head, but for a weight that it shares with the embedding."""
    return {
        parameter
        for parameter, item in parameters.parameters(model, model_config)
        if item.params[0].requires == "has_head"
    }


def _read_record(path: Path) -> dict:
    try:
        then = read_json(path)
        return {"run": then["run"], "dims": then["dims"], "grown": then["grown"]}
    except FileNotFoundError:
        found = "nothing"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{error!r}"
    raise CheckpointError(
        Problem(f"{path}", "the record of the run that is resumed", found, "Choose another --output.")
    )

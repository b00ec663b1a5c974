"""The fit: learns the growth operator on the training loss, the small model frozen, at any layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import FitSection, RunConfig
from megatron_ligo.data.dataset_factory import open_dataset
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.distributed import device, mesh
from megatron_ligo.distributed.mesh import Mesh, all_ranks
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.fit_flops import fit_step_flops
from megatron_ligo.growth.methods import describe
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import check_factored, initial_operator
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel, FactoredPipeline
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.factored.teacher import Teacher
from megatron_ligo.models.mcore.layer_spec import check_network
from megatron_ligo.sharding.tensor_parallel import check_tp
from megatron_ligo.training import loop
from megatron_ligo.training.best_operator import BestOperator
from megatron_ligo.training.checkpointing import reshard, run_checkpoints
from megatron_ligo.training.checkpointing.gather_operator import gather_operator
from megatron_ligo.training.engine import Engine, micro_batches
from megatron_ligo.training.initial_weights import check_layout
from megatron_ligo.training.lag import Lag, open_lag
from megatron_ligo.training.metrics import peak_memory_bytes
from megatron_ligo.training.output_lock import lock_output

log = logging.getLogger(__name__)

# What may differ between a run and its resumption: no number depends on it but for the rounding of another layout.
FREE = (
    "save_every", "keep_last", "timeout_minutes", "grace_seconds", "bad_numbers", "spike", "check_replicas_every",
    "parallel", "micro_batch_size", "recompute", "source",
)  # fmt: skip


class Fit:
    """One fit from its config to its operator; `run` is the whole of it. Collective over all processes."""

    def __init__(self, config: RunConfig, output: Path):
        self.config = config
        self.fit = config.fit
        self.output = output
        mesh.init_distributed(self.fit.timeout_minutes)
        self.ranks = all_ranks()
        self.dtype = self.ranks.run_on_all(lambda: device.resolve_dtype(self.fit.precision))
        self.reader, self.operator, self.lag = self.ranks.run_on_all(lambda: prepare(config))
        self.step_flops = self._step_flops()
        self.fit = self.ranks.run_on_all(lambda: within_budget(self.fit, self.step_flops))
        self.mesh: Mesh = mesh.build_mesh(self.fit.parallel.tp, self.fit.parallel.pp)
        self.count = self.ranks.run_on_all(lambda: micro_batches(self.fit, self.mesh))
        lock_output(output)
        self.found = run_checkpoints.newest(output / loop.FOLDER)
        self.moved = reshard.layout_changed(self.found, self.fit, self.mesh)
        torch.manual_seed(self.fit.seed)
        if self.found:
            self.ranks.run_on_all(lambda: check_same_run(self.found.state["run"], self._identity(), output))
        lock_output(output, make=True)
        self.data = self._open_data()
        self.runtime = self._runtime()
        self.module = FactoredPipeline(self.runtime) if self.mesh.pp > 1 else FactoredModel(self.runtime)
        self.engine = self._build()

    def run(self) -> None:
        """Fits, from the last checkpoint if there is one, and writes OUTPUT/operator."""
        state = self._resume()
        losses = state["losses"]
        if "start" not in losses:
            losses["start"] = self.evaluate()
            log.info("loss of the initialisation: %.6f", losses["start"])
        best = BestOperator(self.fit, self.output / "best", state, self._save_operator)
        self._steps(state, best)
        losses["last"] = self.evaluate()
        log.info("loss after the last step: %.6f", losses["last"])
        best.look(self.engine.steps, losses["last"])
        losses["end"] = losses["last"] if self.fit.keep == "last" else best.loss
        self._write(losses, state["digest"], best)

    def evaluate(self) -> float:
        """Loss on the held-out batch, in fp32 whatever the fit's precision."""
        batches = self.data.eval_batch(
            self.fit.eval_samples, self.fit.micro_batch_size, self.mesh.dp, self.mesh.dp_rank
        )
        with self.module.step_state.computing_in(torch.float32):
            return self.engine.evaluate(batches)

    def _steps(self, state: dict, best: BestOperator) -> None:
        def after(step: int) -> dict[str, float]:
            if step == self.fit.steps or not loop.due(step, self.fit.eval_every):
                return {}
            loss = self.evaluate()
            best.look(step, loss)
            return {"eval_loss": loss}

        made = (self.engine, self.data, self.fit, self.output, state, self._tokens(), self.step_flops)
        loop.run(*made, after=after, enough=best.is_enough)

    def _step_flops(self) -> float:
        tokens, seq = self._tokens(), self._tokens_of_sample()
        return fit_step_flops(self.operator, tokens, seq, self.fit.distill > 0, self.lag is not None)

    def _tokens(self) -> int:
        """Of one step, over all ranks."""
        return self.fit.global_batch_size * self._tokens_of_sample()

    def _tokens_of_sample(self) -> int:
        return self.operator.large.tokens_of_sample(self.config.data.seq_length)

    def _build(self) -> Engine:
        """The engine, with what a checkpoint of another layout holds."""
        learned = self.ranks.run_on_all(lambda: reshard.SavedOptimizer(self.found)) if self.moved else None
        if learned:
            self.ranks.run_on_all(lambda: reshard.fill_module(self.module, learned.cut_for(self.mesh)))
        engine = Engine(self.module, self.mesh, self.fit, self._groups(), after_update=self._after_update)
        if learned:
            reshard.fill_optimizer(engine.engine, learned.cut_for(self.mesh), learned.steps)
            engine.begin_at(self.found.step)
        return engine

    def _resume(self) -> dict:
        """The state of the last checkpoint, which is loaded; a fresh one where there is none."""
        if self.found is None:
            return {
                model_record.RUN_STATE_CONTENT: "operator",
                "run": self._identity(),
                "losses": {},
                "digest": self._digest(),
            }
        if not self.moved:
            run_checkpoints.load(self.engine, self.found)
        log.info("resumed after step %d", self.engine.steps)
        return self.found.state

    def _identity(self) -> dict:
        """All that the numbers of the run depend on, but for the layout, as plain data."""
        table = self.config.to_dict()
        fit = {key: value for key, value in table["fit"].items() if key not in FREE}
        data = {key: value for key, value in table["data"].items() if key != "cache"}
        return {name: table[name] for name in ("small", "large", "operator")} | {"fit": fit, "data": data}

    def _digest(self) -> str:
        return self.data.eval_digest(self.fit.eval_samples)

    def _groups(self) -> list[dict]:
        """Width maps and depth maps, each at its own rate."""
        ratio = 1.0 if self.fit.depth_lr is None else self.fit.depth_lr / self.fit.lr
        kinds: dict[bool, list[nn.Parameter]] = {False: [], True: []}
        for name, parameter in self.module.named_parameters():
            kinds[".depth." in f".{name}"].append(parameter)
        decay = self.fit.weight_decay
        return [{"params": kinds[d], "lr_scale": ratio if d else 1.0, "weight_decay": decay} for d in (False, True)]

    def _after_update(self) -> None:
        self.module.step_state.mark_updated()

    def _open_data(self) -> ShardedSampler:
        fit = self.fit
        samples = fit.steps * fit.global_batch_size
        return open_dataset(self.config.data, self.operator.large, samples, fit.eval_samples, self.output)

    def _runtime(self) -> FactoredContext:
        shared_by = 1 if self.fit.parallel.zero == 3 else self.count
        return FactoredContext(
            self.operator,
            SmallWeights(self.operator, self.reader, self.mesh, self.fit.parallel.zero, self.fit.source == "whole"),
            self.mesh,
            self.dtype,
            micro_batches=shared_by,
            tokens_per_step=shared_by * self.fit.micro_batch_size * self._tokens_of_sample(),
            recompute=self.fit.recompute,
            sequence_parallel=self.fit.parallel.sequence_parallel,
            gradients_each=self.fit.parallel.zero == 2,
            teacher=self._teacher() if self.fit.distill else None,
            lag=self.lag,
        )

    def _teacher(self) -> Teacher:
        sequence_parallel = self.fit.parallel.sequence_parallel
        return Teacher(self.reader, self.mesh, self.dtype, self.fit.distill, sequence_parallel)

    def _save_operator(self, folder: Path) -> None:
        """The operator as it stands. Collective."""
        tensors = gather_operator(self.module, self.runtime)
        self.ranks.run_on_rank_0(
            lambda: operator_file.write_operator(self.operator, tensors.items(), folder, {"step": self.engine.steps})
        )

    def _write(self, losses: dict[str, float], digest: str, best: BestOperator) -> None:
        tensors = self._chosen(best)
        memory: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(memory, peak_memory_bytes())
        made = {
            "source": {"path": Path(self.config.small.path).name, "format": self.reader.format},
            "step": self.engine.steps if self.fit.keep == "last" else best.step,
            "steps_done": self.engine.steps,
            "losses": losses,
            "eval": {"samples": self.fit.eval_samples, "digest": digest},
            "lagged": self.lag is not None,
            "layout": self.engine.layout,
            "peak_memory_bytes": memory,
            "config": self.config.to_dict(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        }
        self.ranks.run_on_rank_0(
            lambda: operator_file.write_operator(self.operator, tensors.items(), self.output / "operator", made)
        )

    def _chosen(self, best: BestOperator) -> Mapping[str, Tensor]:
        """The tensors that are written, on rank 0. Collective."""
        if self.fit.keep == "last" or best.step == self.engine.steps:
            return gather_operator(self.module, self.runtime)
        log.warning("the operator of step %d is kept: its held-out loss was the lowest, %.6f", best.step, best.loss)
        kept = self.operator if best.step == 0 else operator_file.OperatorFile(best.folder)
        return {name: kept.tensor(name) for name in kept.shapes()}


def within_budget(fit: FitSection, step_flops: float) -> FitSection:
    """The fit with as many steps as max_flops pays for. ConfigError if it pays for none."""
    if fit.max_flops is None:
        return fit
    steps = int(fit.max_flops // step_flops)
    if not steps:
        raise ConfigError(Problem("fit.max_flops", f"at least one step's {step_flops:.3g}", fit.max_flops))
    return replace(fit, steps=min(fit.steps, steps))


def prepare(config: RunConfig) -> tuple[Reader, Operator, Lag | None]:
    """The small model, the operator's start and the lag, if there is one; every reason why the job cannot be done,
    before any of it is."""
    small = config.small
    if not small.path:
        raise ConfigError("small.path: expected the small model's checkpoint, found nothing. Set it in [small].")
    reader = formats.open(small.path, None if small.format == "auto" else small.format)
    check_network(reader.model_config)
    operator = initial_operator(reader.model_config, config.large, config.operator)
    errors = ErrorCollector("the fit cannot be done", ConfigError)
    check_factored(operator.settings, errors)
    length = operator.large.tokens_of_sample(config.data.seq_length)
    check_teacher(operator, config.fit, length, errors)
    lag = open_lag(config.fit.lag, operator, reader, errors) if config.fit.lag else None
    errors.raise_if_any()
    check_layout(operator.large, config.fit.parallel, length)
    counts = operator.num_parameters()
    log.info("%s", describe(operator.settings, operator.small, operator.large))
    log.info("operator: %s learned numbers", f"{sum(counts.values()):,}")
    for name, count in counts.items():
        log.info("  %-28s %s", name, f"{count:,}")
    return reader, operator, lag


def check_teacher(operator: Operator, fit: FitSection, seq_length: int, errors: ErrorCollector) -> None:
    if not fit.distill:
        return
    if fit.parallel.pp > 1:
        errors.add("fit.distill", "0 under a pipeline: the teacher has no stages", fit.distill, "Set pp = 1.")
    check_tp(operator.small, fit.parallel.tp, errors)
    if operator.large.vocab_size != operator.small.vocab_size:
        hint = "The teacher knows nothing of the new tokens."
        errors.add("fit.distill", "0 where the vocabulary grows", fit.distill, hint)
    if operator.large.image_size != operator.small.image_size:
        errors.add("fit.distill", "0 where the image grows", fit.distill, "The teacher sees smaller ones.")
        return
    longest = operator.small.longest_sequence
    if operator.arch.has_learned_positions and seq_length > longest:
        hint = f"The teacher has {longest} positions: fit on so many, and pretrain on more."
        errors.add("fit.distill", f"0 with data.seq_length = {seq_length}", fit.distill, hint)


def check_same_run(then: dict, now: dict, output: Path) -> None:
    """ConfigError with every setting that differs from those of the run that is to be resumed."""
    errors = ErrorCollector(f"{output} holds a run with other settings", ConfigError)
    before, after, defaults = _flat(then), _flat(now), _flat(RunConfig().to_dict())
    for key in sorted(before.keys() | after.keys()):
        # A setting that came after the run was at its default.
        was = before.get(key, defaults.get(key))
        if was != after.get(key):
            errors.add(key, was, after.get(key), "Resume with the same, or choose another --output.")
    errors.raise_if_any()


def _flat(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

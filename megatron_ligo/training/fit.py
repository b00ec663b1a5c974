"""The fit: learns the growth operator on the training loss, the small model frozen, at any layout."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_ligo import formats
from megatron_ligo.config import Config
from megatron_ligo.errors import ConfigError, Faults
from megatron_ligo.formats import record
from megatron_ligo.formats.base import Reader
from megatron_ligo.growth import file
from megatron_ligo.growth.check import check_factored, initial_operator
from megatron_ligo.growth.cost import fit_step_flops
from megatron_ligo.growth.methods import describe
from megatron_ligo.growth.operator import Operator
from megatron_ligo.model.build import check_network
from megatron_ligo.model.grown_model import GrownModel, GrownPipeline
from megatron_ligo.model.runtime import Runtime
from megatron_ligo.model.source import Source
from megatron_ligo.parallel import accelerator, mesh
from megatron_ligo.parallel.mesh import Mesh
from megatron_ligo.training import checkpoints, loop
from megatron_ligo.training.collect import collect
from megatron_ligo.training.data import Data, open_data
from megatron_ligo.training.engine import Engine, micro_batches
from megatron_ligo.training.metrics import peak_memory_bytes
from megatron_ligo.training.samples import everywhere, on_rank_0
from megatron_ligo.training.start import check_layout

log = logging.getLogger(__name__)

# What may differ between a run and its resumption without changing a number.
FREE = (
    "save_every", "keep_last", "timeout_minutes", "grace_seconds", "bad_numbers", "spike", "check_replicas_every",
)  # fmt: skip


class Fit:
    """One fit from its config to its operator; `run` is the whole of it. Collective over all processes."""

    def __init__(self, config: Config, output: Path):
        self.config = config
        self.fit = config.fit
        self.output = output
        mesh.start(self.fit.timeout_minutes)
        self.dtype = everywhere(lambda: accelerator.dtype_of(self.fit.precision))
        self.reader, self.operator = everywhere(lambda: prepare(config))
        self.mesh: Mesh = mesh.make(self.fit.parallel.tp, self.fit.parallel.pp)
        self.count = everywhere(lambda: micro_batches(self.fit, self.mesh))
        torch.manual_seed(self.fit.seed)
        self.data = self._open_data()
        self.runtime = self._runtime()
        self.module = GrownPipeline(self.runtime) if self.mesh.pp > 1 else GrownModel(self.runtime)
        self.engine = Engine(self.module, self.mesh, self.fit, self._groups(), after_update=self._moved)

    def run(self) -> None:
        """Fits, from the last checkpoint if there is one, and writes OUTPUT/operator."""
        state = self._resume()
        losses = state["losses"]
        if "start" not in losses:
            losses["start"] = self.evaluate()
            log.info("loss of the initialisation: %.6f", losses["start"])
        self._steps(state)
        losses["end"] = self.evaluate()
        log.info("loss after the fit: %.6f", losses["end"])
        self._write(losses, state["digest"])

    def evaluate(self) -> float:
        """Loss on the held-out batch, in fp32 whatever the fit's precision."""
        batches = self.data.eval_batch(
            self.fit.eval_samples, self.fit.micro_batch_size, self.mesh.dp, self.mesh.dp_rank
        )
        self.runtime.dtype = torch.float32
        loss = self.engine.evaluate(batches)
        self.runtime.dtype = self.dtype
        return loss

    def _steps(self, state: dict) -> None:
        fit, seq = self.fit, self.config.data.seq_length
        tokens = fit.global_batch_size * seq
        flops = fit_step_flops(self.operator, tokens, seq)
        loop.run(self.engine, self.data, fit, self.output, state, tokens, flops)

    def _resume(self) -> dict:
        """The state of the last checkpoint, checked to be of this run; a fresh one where there is none."""
        this = self._identity()
        found = checkpoints.newest(self.output / loop.FOLDER)
        if found is None:
            return {record.HOLDS: "operator", "run": this, "losses": {}, "digest": self._digest()}
        everywhere(lambda: check_same_run(found.state["run"], this, self.output))
        checkpoints.load(self.engine, found)
        log.info("resumed after step %d", self.engine.steps)
        return found.state

    def _identity(self) -> dict:
        """All that the numbers of the run depend on, the layout included, as plain data."""
        table = self.config.to_dict()
        fit = {key: value for key, value in table["fit"].items() if key not in FREE}
        return {"small": table["small"], "large": table["large"], "operator": table["operator"], "fit": fit} | {
            "data": {key: value for key, value in table["data"].items() if key != "cache"},
            "processes": {"dp": self.mesh.dp},
        }

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

    def _moved(self) -> None:
        self.runtime.generation += 1

    def _open_data(self) -> Data:
        config, fit = self.config.data, self.fit
        cache = config.cache or self.output / "data_cache"
        samples = fit.steps * fit.global_batch_size
        data = open_data(config, config.seq_length, samples, fit.eval_samples, config.seed, cache)
        data.check_vocab(self.operator.large.vocab_size)
        return data

    def _runtime(self) -> Runtime:
        shared_by = 1 if self.fit.parallel.zero == 3 else self.count
        return Runtime(
            self.operator,
            Source(self.operator, self.reader, self.mesh, self.fit.parallel.zero, self.fit.source == "whole"),
            self.mesh,
            self.dtype,
            micro_batches=shared_by,
            tokens_per_step=shared_by * self.fit.micro_batch_size * self.config.data.seq_length,
            recompute=self.fit.recompute,
            sequence_parallel=self.fit.parallel.sequence_parallel,
            gradients_each=self.fit.parallel.zero == 2,
        )

    def _write(self, losses: dict[str, float], digest: str) -> None:
        tensors = collect(self.module, self.runtime)
        memory: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(memory, peak_memory_bytes())
        made = {
            "source": {"path": Path(self.config.small.path).name, "format": self.reader.format},
            "step": self.engine.steps,
            "losses": losses,
            "eval": {"samples": self.fit.eval_samples, "digest": digest},
            "layout": {"tp": self.mesh.tp, "pp": self.mesh.pp, "dp": self.mesh.dp, "zero": self.fit.parallel.zero},
            "peak_memory_bytes": memory,
            "config": self.config.to_dict(),
            "versions": {name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
        }
        on_rank_0(lambda: file.write(self.operator, tensors.items(), self.output / "operator", made))


def prepare(config: Config) -> tuple[Reader, Operator]:
    """The small model and the operator's start; every reason why the job cannot be done, before any of it is."""
    small = config.small
    if not small.path:
        raise ConfigError("small.path: expected the small model's checkpoint, found nothing. Set it in [small].")
    reader = formats.open(small.path, None if small.format == "auto" else small.format)
    check_network(reader.dims)
    operator = initial_operator(reader.dims, config.large, config.operator)
    faults = Faults("the fit cannot be done", ConfigError)
    check_factored(operator.settings, faults)
    faults.raise_if_any()
    check_layout(operator.large, config.fit.parallel, config.data.seq_length)
    counts = operator.num_parameters()
    log.info("%s", describe(operator.settings))
    log.info("operator: %s learned numbers", f"{sum(counts.values()):,}")
    for name, count in counts.items():
        log.info("  %-28s %s", name, f"{count:,}")
    return reader, operator


def check_same_run(then: dict, now: dict, output: Path) -> None:
    """ConfigError with every setting that differs from those of the run that is to be resumed."""
    faults = Faults(f"{output} holds a run with other settings", ConfigError)
    before, after = _flat(then), _flat(now)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            faults.add(key, before.get(key), after.get(key), "Resume with the same, or choose another --output.")
    faults.raise_if_any()


def _flat(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

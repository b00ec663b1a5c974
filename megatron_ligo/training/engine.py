"""A DeepSpeed engine over one module (PP = 1; ZeRO 1, 2, 3) or a pipeline (PP > 1; ZeRO 1), stepped alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from megatron_ligo.common.errors import LayoutError, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.distributed import device
from megatron_ligo.distributed.mesh import DeepSpeedMpu, Mesh
from megatron_ligo.distributed.parallel_dims import EngineLayout
from megatron_ligo.training import deepspeed_profile
from megatron_ligo.training.checkpointing import engine_files

Batch = dict[str, Tensor]  # tokens, labels: int64 (b, s); loss_mask: fp32 (b, s)


def count_micro_batches(run: TrainingSection, mesh: Mesh) -> int:
    """Micro-batches a step on each data-parallel rank."""
    per_pass = run.micro_batch_size * mesh.dp
    if run.global_batch_size % per_pass:
        expected = f"a multiple of micro_batch_size x dp = {run.micro_batch_size} x {mesh.dp} = {per_pass}"
        raise LayoutError(Problem("global_batch_size", expected, run.global_batch_size))
    return run.global_batch_size // per_pass


def engine_layout(run: TrainingSection, mesh: Mesh) -> EngineLayout:
    """Returns the layout that the checkpoints of an engine over this mesh have."""
    return EngineLayout(mesh.dims, run.parallel.zero)


def build_deepspeed_config(run: TrainingSection, mesh: Mesh, bf16: bool, universal: bool) -> dict:
    """DeepSpeed's config: the profile, and what the run's config says."""
    table = deepspeed_profile.read_profile(run.parallel)
    config = {
        **table,
        "train_batch_size": run.global_batch_size,
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": count_micro_batches(run, mesh),
        "gradient_clipping": run.clip,
        "bf16": {**table.get("bf16", {}), "enabled": bf16},
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    if run.parallel.sequence_parallel:
        # DeepSpeed would cut activations over the tensor-parallel ranks as if they were equal there.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return config


def build_optimizer(run: TrainingSection, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW or SGD over groups of {params, lr_scale, weight_decay}."""
    groups = [{**group, "lr": run.lr * group.get("lr_scale", 1.0)} for group in groups]
    if run.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=run.lr)
    # On a CPU the fused kernel takes a tenth of the time and no scratch memory of the parameters' size.
    fused = device.is_cpu() or None
    return torch.optim.AdamW(groups, lr=run.lr, betas=tuple(run.betas), eps=run.eps, fused=fused)


class Engine:
    """One step, one evaluation, whatever the layout.

    groups: the optimizer's, as `optimizer` takes them. after_update: called when the parameters have changed.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        run: TrainingSection,
        groups: list[dict],
        bf16: bool = False,
        universal: bool = False,
        after_update: Callable[[], None] = lambda: None,
    ):
        self.mesh = mesh
        self.run = run
        self.after_update = after_update
        self.pipelined = isinstance(module, PipelineModule)
        self.micro_batches = count_micro_batches(run, mesh)
        self.scales = [group.get("lr_scale", 1.0) for group in groups]
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(run, groups),
            config=build_deepspeed_config(run, mesh, bf16, universal),
            mpu=None if self.pipelined else DeepSpeedMpu(mesh),
            dist_init_required=False,
        )
        self.files = engine_files.install_checkpoint_files(self.engine)
        self.refused = False

    @property
    def steps(self) -> int:
        return self.engine.global_steps

    @property
    def layout(self) -> EngineLayout:
        return engine_layout(self.run, self.mesh)

    def set_step(self, step: int) -> None:
        """Counts on from so many steps."""
        self.engine.global_steps = step
        self.engine.global_samples = step * self.run.global_batch_size

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def set_lr(self, lr: float) -> None:
        for group, scale in zip(self.engine.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = lr * scale

    def train_step(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """One optimizer step over this rank's micro-batches -> (loss over all ranks, gradient norm before clipping).

        `refused` says afterwards that the gradients were not finite on some rank, and that no rank has applied them.
        """
        batches = list(batches)
        assert len(batches) == self.micro_batches, "a step takes all its micro-batches"
        self.engine.train()
        if self.pipelined:
            loss = float(self.engine.train_batch(iter(map(_pipeline_batch, batches))))
        else:
            loss = self._mean_over_dp(self._accumulate(batches).mean())
        self.refused = getattr(self.engine.optimizer, "overflow", False)
        self.after_update()
        norm = self.engine.get_global_grad_norm()
        return loss, math.nan if norm is None else float(norm)

    def _accumulate(self, batches: list[Batch]) -> Tensor:
        """Loss of each micro-batch, of a step without a pipeline."""
        losses = []
        for batch in batches:
            loss = self.engine(*_on_device(batch))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    def rerun_refused_step(self, batches: list[Batch]) -> tuple[list[float], list[str]]:
        """Takes a step that was refused once more: (this rank's losses by micro-batch, parameters with bad gradients).

        A stage that computes no loss gives none. It is refused again, so that nothing changes.
        """
        engine, bad = self.engine, []
        counters = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}

        def watch(name: str, gradient: Tensor) -> None:
            if name not in bad and not bool(torch.isfinite(gradient).all()):
                bad.append(name)

        hooks = [
            held.register_hook(partial(watch, name))
            for name, held in self.module.named_parameters()
            if held.requires_grad
        ]
        engine.train()
        if self.pipelined:
            engine.train_batch(iter(map(_pipeline_batch, batches)))
            losses = engine.fwd_outputs
        else:
            losses = self._accumulate(batches)
        for hook in hooks:
            hook.remove()
        for name, value in counters.items():
            setattr(engine, name, value)
        return [float(loss) for loss in losses], bad

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss over this rank's micro-batches (equally many on each data-parallel rank) and over all ranks."""
        batches = list(batches)
        self.engine.eval()
        if self.pipelined:
            return self._evaluate_pipeline(batches)
        losses = [self.engine(*_on_device(batch)) for batch in batches]
        return self._mean_over_dp(torch.stack(losses).mean())

    def _evaluate_pipeline(self, batches: list[Batch]) -> float:
        # The stages' buffers fit one precision and one shape: an evaluation may have others than the steps.
        self.engine.reset_activation_shape()
        loss = float(self.engine.eval_batch(iter(map(_pipeline_batch, batches)), num_micro_batches=len(batches)))
        self.engine.reset_activation_shape()
        return loss

    def _mean_over_dp(self, loss: Tensor) -> float:
        loss = loss.float().clone()
        dist.all_reduce(loss, group=self.mesh.dp_group)
        return float(loss) / self.mesh.dp


def _on_device(batch: Batch) -> list[Tensor]:
    return [batch[name].to(device.current_device()) for name in ("tokens", "labels", "loss_mask")]


def _pipeline_batch(batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return batch["tokens"], (batch["labels"], batch["loss_mask"])

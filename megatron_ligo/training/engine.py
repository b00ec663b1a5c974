"""A DeepSpeed engine over one module (PP = 1; ZeRO 1, 2, 3) or a pipeline (PP > 1; ZeRO 1), with one interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from torch import Tensor, nn

from megatron_ligo.arch.mcore_names import sort_by_construction
from megatron_ligo.common.errors import ConfigError, ErrorCollector, LayoutError, Problem
from megatron_ligo.config.run_config import FitSection, TrainingSection
from megatron_ligo.data.sampler import Batch
from megatron_ligo.distributed import device, rank_watch
from megatron_ligo.distributed.mesh import DeepSpeedMpu, Mesh
from megatron_ligo.distributed.parallel_dims import EngineLayout
from megatron_ligo.models.mcore.expert_routing import scale_router_loss
from megatron_ligo.training import deepspeed_profile
from megatron_ligo.training.checkpointing import engine_files
from megatron_ligo.training.guard.update_gate import UpdateGate


def count_micro_batches(section: TrainingSection, mesh: Mesh) -> int:
    """Returns the micro-batches per step of each data-parallel rank. LayoutError if the batch does not divide."""
    samples = section.micro_batch_size * mesh.dp
    if section.global_batch_size % samples:
        expected = f"a multiple of micro_batch_size x dp = {section.micro_batch_size} x {mesh.dp} = {samples}"
        name = f"{'fit' if isinstance(section, FitSection) else 'pretrain'}.global_batch_size"
        above = -(-section.global_batch_size // samples) * samples
        hint = f"--set {name}={above}, or change micro_batch_size or the number of processes."
        raise LayoutError(Problem(name, expected, section.global_batch_size, hint))
    return section.global_batch_size // samples


def engine_layout(section: TrainingSection, mesh: Mesh) -> EngineLayout:
    """Returns the layout that an engine over this mesh records in its checkpoints."""
    return EngineLayout(mesh.dims, section.parallel.zero)


def build_deepspeed_config(section: TrainingSection, mesh: Mesh, bf16: bool, universal: bool) -> dict:
    """Returns DeepSpeed's config: the profile, overridden by the run's own settings."""
    profile = deepspeed_profile.read_profile(section.parallel)
    errors = ErrorCollector(f"ds_config {section.parallel.ds_config}", ConfigError)
    deepspeed_profile.check_against_section(profile, section, errors)
    errors.raise_if_any()
    config = {
        **profile,
        # What DeepSpeed's data-parallel ranks read: it knows nothing of the samples of expert-parallel ones, and takes
        # context-parallel ones for data-parallel ones.
        "train_batch_size": section.global_batch_size * mesh.cp // mesh.ep,
        "train_micro_batch_size_per_gpu": section.micro_batch_size,
        "gradient_accumulation_steps": count_micro_batches(section, mesh),
        "gradient_clipping": section.clip,
        "bf16": {**profile.get("bf16", {}), "enabled": bf16},
        "steps_per_print": 1 << 30,
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    sums_dtype = deepspeed_profile.gradient_sums_dtype(profile)
    if bf16 and _may_sum_apart(mesh) and sums_dtype:
        config["data_types"] = {**profile.get("data_types", {}), "grad_accum_dtype": sums_dtype}
        config.setdefault("communication_data_type", sums_dtype)
    if mesh.pp == 1:
        # Gradients are reduced as they come; by default DeepSpeed does so at ZeRO 3 only, and in pipelines never.
        config["zero_optimization"] = {"overlap_comm": True, **profile["zero_optimization"]}
    if section.parallel.sequence_parallel or mesh.ep > 1:
        # DeepSpeed would partition activations over the model-parallel ranks as if they were replicated there.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return config


def name_gradient_sums(section: TrainingSection, mesh: Mesh, bf16: bool) -> str:
    """Returns the dtype in which an engine sums the gradients of micro-batches."""
    chosen = deepspeed_profile.gradient_sums_dtype(deepspeed_profile.read_profile(section.parallel))
    return "fp32" if not bf16 else chosen if chosen and _may_sum_apart(mesh) else "bf16"


def _may_sum_apart(mesh: Mesh) -> bool:
    # In a pipeline DeepSpeed (0.19.8) loses the gradients of tied weights that are summed in another dtype.
    return mesh.pp == 1


def build_parameter_groups(
    model: nn.Module, weight_decay: float, trained: set[nn.Parameter] | None = None
) -> list[dict]:
    """Returns the optimizer's groups: matrices with weight decay, norms and biases without.

    trained: the parameters to update (None: all). The others get a learning rate of 0.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (False, True): []}
    by_name = dict(model.named_parameters())
    # Transformer Engine registers norms later: ZeRO's flat tensors would hold the weights in another order.
    for parameter in map(by_name.__getitem__, sort_by_construction(by_name)):
        # ZeRO 3 may have divided it already.
        key = len(getattr(parameter, "ds_shape", parameter.shape)) > 1, trained is None or parameter in trained
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if is_matrix else 0.0, "lr_scale": 1.0 if is_trained else 0.0}
        for (is_matrix, is_trained), group in groups.items()
        if group
    ]


def build_optimizer(section: TrainingSection, groups: list[dict]) -> torch.optim.Optimizer:
    """Builds AdamW or SGD over groups of {params, lr_scale, weight_decay}."""
    groups = [{**group, "lr": section.lr * group.get("lr_scale", 1.0)} for group in groups]
    if section.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=section.lr)
    # The fused kernel needs no scratch memory the size of the parameters.
    fused = device.has_fused_adamw() or None
    return torch.optim.AdamW(groups, lr=section.lr, betas=tuple(section.betas), eps=section.eps, fused=fused)


@contextmanager
def _same_optimizer_at_every_stage() -> Iterator[None]:
    """Within it, engines of ZeRO 1 get ZeRO's optimizer although they sum gradients of bf16 weights in fp32.

    DeepSpeed (0.19.8) would take another one, whose checkpoints no other stage reads.
    """
    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def choose_zero(engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> str | None:
        kind = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if engine.zero_optimization() else kind

    DeepSpeedEngine._do_optimizer_sanity_check = choose_zero
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


class Engine:
    """Takes optimizer steps and evaluates, with the same interface at every layout.

    groups: parameter groups for `build_optimizer`. after_update: called after the parameters have changed.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        section: TrainingSection,
        groups: list[dict],
        bf16: bool = False,
        universal: bool = False,
        after_update: Callable[[], None] = lambda: None,
    ):
        self.mesh = mesh
        self.section = section
        self.gradient_sums = name_gradient_sums(section, mesh, bf16)
        self.after_update = after_update
        self.is_pipeline = isinstance(module, PipelineModule)
        self.micro_batches = count_micro_batches(section, mesh)
        self.lr_scales = [group.get("lr_scale", 1.0) for group in groups]
        with _same_optimizer_at_every_stage():
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(section, groups),
                config=build_deepspeed_config(section, mesh, bf16, universal),
                mpu=None if self.is_pipeline else DeepSpeedMpu(mesh),
                dist_init_required=False,
            )
        scale_router_loss(self.micro_batches, device.current_device())
        self.files = engine_files.install_checkpoint_files(self.engine)
        # Takes the loss and the gradient norm of a step, the same on all ranks; True: no rank applies its update.
        self.refuse_update: Callable[[float, float], bool] = lambda loss, norm: False
        self.gate = UpdateGate(self.engine.optimizer, self._decide)
        # True if no rank has applied the last step: some gradient was not finite, or `refuse_update` refused it.
        self.step_refused = False
        self.lr = section.lr
        self._losses: list[Tensor] = []

    @property
    def steps(self) -> int:
        return self.engine.global_steps

    @property
    def layout(self) -> EngineLayout:
        return engine_layout(self.section, self.mesh)

    def set_step(self, step: int) -> None:
        """Sets the number of finished steps."""
        self.engine.global_steps = step
        self.engine.global_samples = step * self.section.global_batch_size

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    def set_lr(self, lr: float) -> None:
        self.lr = lr
        for group, scale in zip(self.engine.optimizer.param_groups, self.lr_scales, strict=True):
            group["lr"] = lr * scale

    def train_step(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Takes one optimizer step over this rank's micro-batches.

        Returns the mean loss over all ranks and the gradient norm before clipping; sets `step_refused`.
        """
        rank_watch.mark_progress()
        batches = [take_context_part(batch, self.mesh) for batch in batches]
        assert len(batches) == self.micro_batches, "a step takes all its micro-batches"
        self.engine.train()
        self.gate.reset()
        if self.is_pipeline:
            loss = self._mean_over_ep(self.engine.train_batch(iter(map(_to_pipeline_batch, batches))))
        else:
            self._accumulate(batches)
            loss = self._mean_loss()
        self.step_refused = getattr(self.engine.optimizer, "overflow", False)
        self.after_update()
        norm = self.engine.get_global_grad_norm() if self.gate.norm is None else self.gate.norm
        return loss, math.nan if norm is None else float(norm)

    def _accumulate(self, batches: list[Batch]) -> list[Tensor]:
        """Runs a step without a pipeline; returns the scalar loss of each micro-batch."""
        self._losses = []
        for batch in batches:
            rank_watch.mark_progress()
            loss = self.engine(*_to_device(batch))
            self.engine.backward(loss)
            self._losses.append(loss.detach())
            self.engine.step()
        return self._losses

    def _mean_loss(self) -> float:
        """Returns the mean loss of the current step over all ranks, whose micro-batches are all done. Collective."""
        if self.is_pipeline:
            return self._mean_over_ep(self.engine._aggregate_total_loss())
        return self._mean_over_replicas(torch.stack(self._losses).mean())

    @torch.no_grad()
    def _decide(self, norm: float) -> bool:
        """Returns whether to refuse the update with this gradient norm: rank 0's numbers decide on all ranks."""
        numbers = torch.tensor([self._mean_loss(), norm], dtype=torch.float64, device=device.current_device())
        dist.broadcast(numbers, src=0)
        return self.refuse_update(*numbers.tolist())

    def rerun_refused_step(self, batches: list[Batch]) -> tuple[list[float], list[str]]:
        """Repeats a refused step to find its cause. The step is refused again, so no state changes.

        Returns this rank's loss per micro-batch (none on a stage without the loss), and the names of the parameters
        whose gradients are not finite.
        """
        engine, bad_names = self.engine, []
        batches = [take_context_part(batch, self.mesh) for batch in batches]
        counters = {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")}

        def check_gradient(name: str, gradient: Tensor) -> None:
            if name not in bad_names and not bool(torch.isfinite(gradient).all()):
                bad_names.append(name)

        hooks = [
            parameter.register_hook(partial(check_gradient, name))
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad
        ]
        engine.train()
        if self.is_pipeline:
            engine.train_batch(iter(map(_to_pipeline_batch, batches)))
            losses = engine.fwd_outputs
        else:
            losses = self._accumulate(batches)
        for hook in hooks:
            hook.remove()
        for name, value in counters.items():
            setattr(engine, name, value)
        return [float(loss) for loss in losses], bad_names

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Returns the mean loss over all ranks. All data-parallel ranks must pass the same number of micro-batches."""
        rank_watch.mark_progress()
        batches = [take_context_part(batch, self.mesh) for batch in batches]
        self.engine.eval()
        if self.is_pipeline:
            return self._evaluate_pipeline(batches)
        losses = [self.engine(*_to_device(batch)) for batch in batches]
        return self._mean_over_replicas(torch.stack(losses).mean())

    @torch.no_grad()
    def evaluate_samples(self, batch: Batch) -> list[float]:
        """Returns the loss on each sample of a micro-batch, which every replica must pass. Not with a pipeline."""
        rank_watch.mark_progress()
        self.engine.eval()
        with self.module.measuring_samples():
            return self.engine(*_to_device(take_context_part(batch, self.mesh))).tolist()

    def _evaluate_pipeline(self, batches: list[Batch]) -> float:
        # The stages' buffers have a fixed dtype and shape, which may differ between a step and an evaluation.
        self.engine.reset_activation_shape()
        batch_iterator = iter(map(_to_pipeline_batch, batches))
        loss = self._mean_over_ep(self.engine.eval_batch(batch_iterator, num_micro_batches=len(batches)))
        self.engine.reset_activation_shape()
        return loss

    def _mean_over_ep(self, loss: Tensor) -> float:
        """Returns the mean over all data-parallel ranks of a loss that DeepSpeed's have averaged. Collective."""
        if self.mesh.ep == 1:
            return float(loss)
        loss = loss.detach().float().clone()
        dist.all_reduce(loss, group=self.mesh.ep_group)
        return float(loss) / self.mesh.ep

    def _mean_over_replicas(self, loss: Tensor) -> float:
        loss = loss.float().clone()
        dist.all_reduce(loss, group=self.mesh.replica_group)
        return float(loss) / self.mesh.replicas


def take_context_part(batch: Batch, mesh: Mesh) -> Batch:
    """Returns this context-parallel rank's tokens of each sequence, (b, s / cp) of (b, s), with their labels."""
    if mesh.cp == 1:
        return batch
    return {name: tensor.chunk(mesh.cp, dim=1)[mesh.cp_rank].contiguous() for name, tensor in batch.items()}


def _to_device(batch: Batch) -> list[Tensor]:
    return [batch[name].to(device.current_device()) for name in ("tokens", "labels", "loss_mask")]


def _to_pipeline_batch(batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return batch["tokens"], (batch["labels"], batch["loss_mask"])

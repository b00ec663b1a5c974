"""One rank of a fit or pretraining step of any size on fake tensors: kernels, collectives, and the peak of its memory.

The real models run forward and backward in torch's FakeTensorMode, which computes shapes but no numbers, over a fake
process group of any size. Every decision that depends on the device is taken as on a GPU. The tensors are those of the
CPU, as autograd needs a driver for others: tensors on the wrong device are not noticed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.distributed import device, mesh
from megatron_ligo.distributed.agreement import SINGLE_RANK
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth import random_init
from megatron_ligo.growth.operator import Operator
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.planning import memory, optimizer_memory
from megatron_ligo.planning.planned_job import PlannedJob

# Kinds of the plan that a step without an optimizer does not hold.
WITHOUT_OPTIMIZER = ("optimizer", "buffers", "buckets", "gathered")
TRAINED = ("operator", "weights", "gradients")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
COLLECTIVES = {"c10d", "_c10d_functional"}


class DeviceCounter(TorchDispatchMode):
    """Counts kernels, FLOPs, collectives with their bytes, and the bytes of living tensors.

    A kernel is an operator that writes: views and allocations are none. FLOPs are those of torch's own table; its
    FlopCounterMode would keep recomputed activations alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.kernels: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self._known = WeakIdKeyDictionary()

    def restart(self) -> None:
        """Forgets the counts and the peak; what lives stays."""
        for counter in (self.kernels, self.collectives, self.collective_bytes):
            counter.clear()
        self.peak, self.flops = self.live, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        after = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        namespace, name = operator._schema.name.split("::")
        if namespace in COLLECTIVES:
            self.collectives[name] += 1
            self.collective_bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in before)
        elif namespace != "prim" and name not in ALLOCATIONS and (operator._schema.is_mutable or self._writes(after)):
            self.kernels[name] += 1
        if operator.overloadpacket in flop_registry:
            self.flops += flop_registry[operator.overloadpacket](*args, **(kwargs or {}), out_val=result)
        for tensor in after:
            # DeepSpeed keeps shapes as tensors without memory.
            if not tensor.is_meta:
                self._note(tensor)
        return result

    def _writes(self, results: list[Tensor]) -> bool:
        return any(tensor.untyped_storage() not in self._known for tensor in results)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class FusedRmsNorm(torch.autograd.Function):
    """The kernels and tensors of torch's fused RMSNorm, which it takes on GPUs only: one forward and one backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.empty_like(weight)


class UnreadOperator(Operator):
    """An operator whose tensors have the right shapes and no numbers."""

    def tensor(self, name: str) -> Tensor:
        is_index = name.startswith("gain.") and name.endswith("source")
        return torch.empty(self.shapes()[name], dtype=torch.int64 if is_index else torch.float32)


@dataclass(frozen=True)
class UnreadWeights:
    """A reader of the small model whose tensors have the right shapes and no numbers."""

    model_config: ModelConfig

    @property
    def arch(self) -> Architecture:
        return architectures.get(self.model_config.arch)

    def read(self, key: str) -> Tensor:
        """Returns an uninitialised tensor of the key's shape, fp32."""
        return torch.empty(self.arch.param(key).shape(self.model_config))


@dataclass(frozen=True)
class StepCount:
    """What a micro-batch after the first one does on a rank: forward, backward, no optimizer.

    peak: bytes; planned: bytes that the plan gives for the same; kernels, collectives, collective_bytes: by operator.
    """

    layers: int
    forward_kernels: int
    kernels: dict[str, int]
    collectives: dict[str, int]
    collective_bytes: dict[str, int]
    peak: int
    planned: int
    flops: int

    @property
    def kernels_per_layer(self) -> float:
        return sum(self.kernels.values()) / self.layers


def has_low_rank(job: PlannedJob) -> bool:
    """True if a map of the job's operator is of low rank."""
    return job.operator is not None and any(job.operator.rank(name) for name in job.operator.maps)


def count_step(job: PlannedJob) -> StepCount:
    """Counts one micro-batch of a planned job on its first rank. Replaces the process's group by a fake one.

    Neither pipelines nor low-rank maps, which need numbers.
    """
    assert job.parallel.pp == 1 and not has_low_rank(job), "not counted"
    with _fake_ranks(job.world_size), _decisions_of_a_gpu():
        groups = mesh.build_mesh(job.parallel.tp, 1, cp=job.parallel.cp)
        counter = DeviceCounter()
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            model = _build(job, groups)
            _add_gradients(model, job)
            inputs = _inputs(job)
            counter.restart()
            loss = model(*inputs)
            forward = counter.kernels.total()
            loss.backward()
    planned = memory.estimate_stage_memory(job, 0)
    # No engine divides the trained parameters and their gradients here.
    whole = memory.estimate_stage_memory(replace(job, training=_at_zero_1(job.training)), 0)
    planned |= {kind: whole[kind] for kind in TRAINED if kind in whole}
    planned = {kind: count for kind, count in planned.items() if not kind.startswith(WITHOUT_OPTIMIZER)}
    return StepCount(
        job.large.num_layers,
        forward,
        dict(counter.kernels),
        dict(counter.collectives),
        dict(counter.collective_bytes),
        counter.peak,
        sum(planned.values()),
        counter.flops,
    )


def _at_zero_1(training: TrainingSection) -> TrainingSection:
    return replace(training, parallel=replace(training.parallel, zero=1, ds_config=""))


def _build(job: PlannedJob, groups: Mesh) -> torch.nn.Module:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job.training.precision]
    sequence_parallel, recompute = job.parallel.sequence_parallel, job.training.recompute
    if job.operator is None:
        return build_model(job.large, BuildOptions(dtype, groups.tp, sequence_parallel), groups, recompute)
    operator = UnreadOperator(job.operator.small, job.operator.large, job.operator.settings)
    source = SmallWeights(operator, UnreadWeights(operator.small), groups, job.parallel.zero, job.whole_source)
    return FactoredModel(
        FactoredContext(
            operator,
            source,
            groups,
            dtype,
            tokens_per_step=job.micro_batches_per_build * job.micro_batch_tokens,
            recompute=recompute,
            sequence_parallel=sequence_parallel,
        )
    )


def _add_gradients(model: torch.nn.Module, job: PlannedJob) -> None:
    """Gives each parameter the gradient of an earlier micro-batch; DeepSpeed sums those of bf16 weights in fp32."""
    for parameter in model.parameters():
        width = optimizer_memory.gradient_bytes(job.parallel, parameter.element_size())
        if width == parameter.element_size():
            parameter.grad = torch.empty_like(parameter)
        else:
            parameter.register_post_accumulate_grad_hook(partial(_add_to_sum, torch.empty(parameter.shape)))


def _add_to_sum(total: Tensor, parameter: torch.nn.Parameter) -> None:
    total.add_(parameter.grad.to(total.dtype))
    parameter.grad = None


def _inputs(job: PlannedJob) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens (b, s) or images (b, channels, side, side), and labels and mask (b, s) or (b, 1)."""
    large, samples = job.large, job.training.micro_batch_size
    arch = architectures.get(large.arch)
    if not arch.reads_images:
        own = job.seq_length // job.parallel.cp
        tokens = torch.zeros(samples, own, dtype=torch.int64)
        return tokens, tokens.clone(), torch.ones(samples, own)
    images = torch.zeros(samples, large.num_channels, large.image_size, large.image_size)
    return images, torch.zeros(samples, 1, dtype=torch.int64), torch.ones(samples, 1)


@contextlib.contextmanager
def _fake_ranks(world_size: int) -> Iterator[None]:
    """Within it, this process is rank 0 of a group of any size whose collectives do nothing."""
    device.install_cpu_shims()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    mesh.forget_groups()
    # DeepSpeed's all-to-alls go through its own module.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, dist_init_required=False)
    try:
        with _replaced(mesh, "all_ranks", lambda: SINGLE_RANK):
            yield
    finally:
        mesh.forget_groups()
        dist.destroy_process_group()


@contextlib.contextmanager
def _decisions_of_a_gpu() -> Iterator[None]:
    """Within it, kernels and defaults are those of a GPU, and nothing depends on numbers."""

    with (
        _replaced(device, "is_cpu", lambda: False),
        _replaced(F, "rms_norm", lambda x, shape, weight=None, eps=None: FusedRmsNorm.apply(x, weight)),
        # The small model's weights are taken as those of a bf16 checkpoint.
        _replaced(torch, "equal", lambda *_: True),
        _replaced(random_init, "root_mean_square", lambda tensor: 1.0),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

"""The device, its communication backend and its dtypes, through DeepSpeed's accelerator; and every shim for the CPU.

No other module asks which device it runs on. Megatron-core 0.16 to 0.19 makes a few CUDA calls on every device;
`install_cpu_shims` replaces them on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import deepspeed.comm  # noqa: F401 - loads the module that a shim changes
import torch
from deepspeed.accelerator import get_accelerator

from megatron_ligo.common.errors import ConfigError, LayoutError, Problem
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION

# Torch reads the first one unless the second, its old name, is set.
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def is_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def _import_without_compiler() -> None:
    """Imports Megatron-core and DeepSpeed's Muon with torch.compile disabled, on a CPU.

    Both call torch.compile at import time (Megatron-core 0.16.1 and 0.19.2, DeepSpeed 0.19.8). This loads inductor, a
    third of the start-up time of a process, for functions that a CPU run never calls.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda compiled: compiled)
    try:
        from megatron.core import jit

        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()


if is_cpu():
    _import_without_compiler()


def select_local_device() -> None:
    """Makes the GPU with this process's LOCAL_RANK the current one; does nothing on a CPU.

    It must come before anything that allocates on a GPU: a collective of objects, or deepspeed.initialize. Raises
    LayoutError if the node has fewer GPUs, and if GPUs are there that torch cannot use and nobody has chosen the CPU.
    """
    if is_cpu():
        _check_cpu_is_chosen()
        return
    # Layers of many sizes leave gaps between blocks of fixed places. Read when a GPU is first used.
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), get_accelerator().device_count()
    if local_rank >= count:
        hint = "Start one process per GPU (--num_gpus), or check CUDA_VISIBLE_DEVICES."
        raise LayoutError(Problem(f"LOCAL_RANK {local_rank}", f"one of the node's {count} GPUs", "none", hint))
    get_accelerator().set_device(local_rank)


def _check_cpu_is_chosen() -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not DRIVER_VERSION.is_file() or torch.cuda.is_available():
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    hint = (
        "CUDA 13 needs driver 580 or newer, CUDA 12.6 driver 560: install the build of torch for your driver, or set "
        "DS_ACCELERATOR=cpu to use the CPU."
    )
    found = f"torch {torch.__version__}, built for {build}, which cannot use {_driver_name()}"
    raise LayoutError(Problem("NVIDIA driver", "a torch build that can use the node's GPUs", found, hint))


def _driver_name() -> str:
    """Returns the driver's own name and version, on one line."""
    return " ".join(DRIVER_VERSION.read_text(encoding="utf-8", errors="replace").splitlines()[0].split())


def current_device() -> torch.device:
    """Returns this process's device: `cpu`, or the current GPU."""
    return torch.device("cpu") if is_cpu() else torch.device(get_accelerator().current_device_name())


def communication_backend() -> str:
    """Returns the communication backend of the device: nccl, gloo, ..."""
    return "gloo" if is_cpu() else get_accelerator().communication_backend_name()


def replica_tolerance(dtype: torch.dtype) -> float:
    """Returns by how much replicas may differ, relative to their norm: on a CPU by nothing, and kernels of a GPU may
    add in another order on each rank."""
    if is_cpu():
        return 0.0
    return 1e-4 if dtype is torch.float32 else 1e-2


def needs_rank_watch() -> bool:
    """True if a lost rank leaves its peers inside a device call. Under gloo their collectives raise."""
    return communication_backend() == "nccl"


def resolve_dtype(precision: str) -> torch.dtype:
    """Returns the torch dtype of fp32 or bf16. Raises ConfigError if the device cannot compute in it."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" and get_accelerator().is_bf16_supported():
        return torch.bfloat16
    expected = "fp32, or bf16 if the device supports it"
    raise ConfigError(Problem("precision", expected, precision, "Set precision = 'fp32'."))


def has_fused_adamw() -> bool:
    """True if torch's fused AdamW runs here: on a CPU it takes a tenth of the time, on a GPU one kernel per group."""
    return is_cpu() or get_accelerator().device_name() == "cuda"


def has_grouped_attention(dtype: torch.dtype, masked: bool) -> bool:
    """True if a fused attention kernel takes fewer key-value heads than query heads.

    On a GPU only the flash kernel does (torch 2.13), in 16 bits and without a mask; elsewhere torch would fall back to
    a kernel that keeps all attention weights in memory.
    """
    return is_cpu() or (dtype in (torch.bfloat16, torch.float16) and not masked)


def columns_per_product() -> int:
    """Returns how many columns of a narrow stack of weights are cast to fp32 at a time for one product.

    A CPU's caches want few; on a GPU each product is a kernel launch, and the cast of 2^22 columns and 32 layers takes
    512 MiB.
    """
    return 1 << 18 if is_cpu() else 1 << 22


def token_dispatcher() -> str:
    """Returns Megatron-core's dispatcher of tokens to experts: alltoall, which needs CUDA streams, or allgather."""
    return "allgather" if is_cpu() else "alltoall"


def has_transformer_engine() -> bool:
    return not is_cpu() and importlib.util.find_spec("transformer_engine") is not None


def install_cpu_shims() -> None:
    """Installs the CPU shims. Call once per process, before Megatron-core builds a module; does nothing on a GPU."""
    if not is_cpu():
        return
    # Megatron-core (0.16.1, 0.19.2) places parameters and loaded tensors on torch.cuda.current_device().
    torch.cuda.current_device = lambda: torch.device("cpu")
    # dist_checkpointing (0.16.1) synchronizes the device before it writes.
    torch.cuda.synchronize = lambda device=None: None
    # DeepSpeed (0.19.8) compiles an extension at its first init_distributed, under a lock that a killed process
    # leaves behind and that hangs every later run. Only inference uses it. (The package shadows the module's name.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

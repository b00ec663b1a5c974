"""The device, its communication backend and its dtypes, through DeepSpeed's accelerator; and every shim for the CPU.

No other module asks which device it runs on. Megatron-core 0.16 to 0.19 makes a few CUDA calls on every device;
`install_cpu_shims` replaces them on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import deepspeed.comm  # noqa: F401 - loads the module that a shim changes
import torch
from deepspeed.accelerator import get_accelerator

from megatron_ligo.common.errors import ConfigError, Problem


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


def current_device() -> torch.device:
    """Returns this process's device: `cpu`, or the current GPU."""
    return torch.device("cpu") if is_cpu() else torch.device(get_accelerator().current_device_name())


def communication_backend() -> str:
    """Returns the communication backend of the device: nccl, gloo, ..."""
    return "gloo" if is_cpu() else get_accelerator().communication_backend_name()


def resolve_dtype(precision: str) -> torch.dtype:
    """Returns the torch dtype of fp32 or bf16. Raises ConfigError if the device cannot compute in it."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" and get_accelerator().is_bf16_supported():
        return torch.bfloat16
    expected = "fp32, or bf16 if the device supports it"
    raise ConfigError(Problem("precision", expected, precision, "Set precision = 'fp32'."))


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

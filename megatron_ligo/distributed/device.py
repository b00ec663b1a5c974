"""The device, its backend and its precisions, through DeepSpeed's accelerator; and every shim for CPU.

Nothing else in the code asks what machine it runs on. Megatron-core 0.16 to 0.19 calls CUDA in a few
places whatever the device is; `prepare()` answers those calls where there is no CUDA device.
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


def _import_uncompiled() -> None:
    """On a CPU, without compiled functions, which nothing calls there: Megatron-core (0.16.1, 0.19.2) and DeepSpeed's
    Muon (0.19.8) call torch.compile as they are imported, and that loads inductor, a third of the time that a process
    takes to start."""
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda compiled: compiled)
    try:
        from megatron.core import jit

        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler
    jit.disable_jit_fuser()


if is_cpu():
    _import_uncompiled()


def current_device() -> torch.device:
    """This process's device (`cpu`, or the current GPU)."""
    return torch.device("cpu") if is_cpu() else torch.device(get_accelerator().current_device_name())


def communication_backend() -> str:
    """The communication backend that goes with the device: nccl, gloo, ..."""
    return "gloo" if is_cpu() else get_accelerator().communication_backend_name()


def resolve_dtype(precision: str) -> torch.dtype:
    """fp32 or bf16 as a torch dtype; a precision that the device cannot compute in is refused."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16" and get_accelerator().is_bf16_supported():
        return torch.bfloat16
    raise ConfigError(
        Problem("precision", "fp32, or bf16 where the device has it", precision, "Set precision = 'fp32'.")
    )


def has_transformer_engine() -> bool:
    return not is_cpu() and importlib.util.find_spec("transformer_engine") is not None


def install_cpu_shims() -> None:
    """The CPU shims. Call once in each process before Megatron-core builds a module; does nothing on a GPU."""
    if not is_cpu():
        return
    # Megatron-core (0.16.1, 0.19.2) places parameters and loaded tensors on torch.cuda.current_device().
    torch.cuda.current_device = lambda: torch.device("cpu")
    # dist_checkpointing (0.16.1) waits for the device before it writes.
    torch.cuda.synchronize = lambda device=None: None
    # DeepSpeed (0.19.8) compiles an extension at its first init_distributed, under a lock that a killed process
    # leaves behind and that hangs every later run. Only inference uses it. (The package shadows the module's name.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

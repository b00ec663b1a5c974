"""Writes a rank's checkpoint files in another process, a fork of the rank, while the training goes on.

A fork sees the rank's memory as it was: on a CPU nothing is copied before. Device memory and pinned memory do not reach
it, so tensors there are copied to ordinary memory first. A write that fails is an error of the rank.
"""

from __future__ import annotations

import copy
import ctypes
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.distributed import device

log = logging.getLogger(__name__)

# prctl's number (Linux) for the signal that a process gets when the one that forked it ends.
PR_SET_PDEATHSIG = 1
Written = dict[Path, dict]  # size and digest of each file


class BackgroundWriter:
    """Runs `write`, which returns what it has written or raises CheckpointError, in a fork of this process.

    The fork ends with this process: a killed run leaves nothing that still writes. OSError if there can be none.
    """

    def __init__(self, write: Callable[[], Written]):
        self._pipe, answer = os.pipe()
        self._answer = b""
        self._parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self._pipe)
            os.close(answer)
            raise
        if self._pid == 0:
            os.close(self._pipe)
            self._run(write, answer)
        os.close(answer)
        os.set_blocking(self._pipe, False)

    def is_done(self) -> bool:
        """True once the fork has said what it has written, or has ended."""
        return self._read()

    def result(self) -> Written:
        """Waits for the fork and returns what it has written. Raises its CheckpointError."""
        os.set_blocking(self._pipe, True)
        self._read()
        os.close(self._pipe)
        _, status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code or not self._answer:
            end = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            hint = "Restarted, the run resumes from its last checkpoint."
            raise CheckpointError(Problem("the process that writes a checkpoint", "an answer", end, hint))
        answer = json.loads(self._answer)
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return {Path(name): entry for name, entry in answer["written"].items()}

    def _read(self) -> bool:
        """Reads what has arrived (all of it, if the pipe blocks); returns True at the end of the answer."""
        try:
            while part := os.read(self._pipe, 1 << 16):
                self._answer += part
        except BlockingIOError:
            return False
        return True

    def _run(self, write: Callable[[], Written], answer: int) -> NoReturn:
        """Runs in the fork: no handler and no clean-up of the training may."""
        code = 1
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == self._parent:
                try:
                    said = {"written": {f"{path}": entry for path, entry in write().items()}}
                except CheckpointError as error:
                    said = {"error": f"{error}"}
                with os.fdopen(answer, "wb") as stream:
                    stream.write(json.dumps(said).encode())
                code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)


class FinishedWriter:
    """Has the interface of `BackgroundWriter`. This process writes, before it goes on."""

    def __init__(self, write: Callable[[], Written]):
        self._written: Written = {}
        self._error: CheckpointError | None = None
        try:
            self._written = write()
        except CheckpointError as error:
            self._error = error

    def is_done(self) -> bool:
        return True

    def result(self) -> Written:
        """Returns what was written. Raises its CheckpointError."""
        if self._error:
            raise self._error
        return self._written


def start_writer(write: Callable[[], Written]) -> BackgroundWriter | FinishedWriter:
    """Starts `write` in another process; where the system allows none (memory, processes, files), it runs here."""
    try:
        return BackgroundWriter(write)
    except OSError as error:
        log.warning("no process can be started to write a checkpoint (%s): the training waits for it", error)
        return FinishedWriter(write)


def stage(value: object, copies: dict[int, torch.UntypedStorage]) -> object:
    """Returns nested dicts, lists and tuples with the tensors (of any shape) that a fork cannot read copied to ordinary
    memory. copies: by address, the storages that were copied, as tensors may share one."""
    if isinstance(value, Tensor):
        return _to_ordinary_memory(value, copies)
    if isinstance(value, dict):
        # A copy of its own type: state dicts are ordered, and have attributes.
        staged = copy.copy(value)
        staged.update((key, stage(item, copies)) for key, item in value.items())
        return staged
    if type(value) in (list, tuple):
        return type(value)(stage(item, copies) for item in value)
    return value


def _to_ordinary_memory(tensor: Tensor, copies: dict[int, torch.UntypedStorage]) -> Tensor:
    if device.is_cpu() or not tensor.numel():
        return tensor
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in copies:
        copies[storage.data_ptr()] = torch.UntypedStorage(storage.nbytes()).copy_(storage)
    host = torch.empty(0, dtype=tensor.dtype)
    return host.set_(copies[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

"""Last words: a failing rank publishes its reason in the rendezvous store, and the ranks that lose it read it there.

Errors that all ranks can still share go through `agreement`; these ranks no longer answer a collective.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_ligo.common import signal_handling
from megatron_ligo.common.errors import (
    LigoError,
    LostRankError,
    MachineError,
    Stopped,
    describe_lack_of_memory,
    is_out_of_memory,
)
from megatron_ligo.distributed import rank_watch
from megatron_ligo.distributed.rank_watch import RESTART_HINT

# The time that a rank waits for the last words of the others.
STORE_SECONDS = 4.0
STORE_PREFIX = "megatron_ligo/last_words/"
# Error texts of gloo, nccl and the store for a rank that is gone, or late.
LOST_MESSAGES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed",
    "Application timeout caused pair closure", "remote process exited", "Connection closed by remote peer",
    "ncclRemoteError", "ncclSystemError", "unhandled system error", "NCCL communicator was aborted",
    "NCCL Operation Aborted", "ncclCommAbort", "was previously aborted",
)  # fmt: skip
TIMEOUT_MESSAGES = ("Timed out waiting", "timed out", "Timeout", "timeout")
# What nccl itself said last: the system call that failed, the peer's address.
NCCL_DETAIL = re.compile(r"Last error:\s*(\S[^\n]*)")
LOST_ERRORS = (RuntimeError, dist.DistError)

T = TypeVar("T")


@contextmanager
def report_failures() -> Iterator[None]:
    """Wraps a job of all ranks: a failing rank publishes its reason; a rank that loses another reports which and why.

    Raises LostRankError in place of the communication error.
    """
    try:
        with _name_lack_of_memory():
            yield
    except Stopped:
        raise
    except Exception as error:
        if not dist.is_initialized() or (isinstance(error, LigoError) and error.agreed):
            # There is no other rank, or every rank raises the same error.
            raise
        kind = _classify_loss(error)
        with signal_handling.defer_signals(STORE_SECONDS * 3):
            if kind is None:
                _publish_failure(f"{error}" or type(error).__name__)
                raise
            reason = _explain_loss(kind)
            detail = NCCL_DETAIL.search(f"{error}")
            raise LostRankError(f"{reason}\n  nccl: {detail[1]}" if detail else reason) from error
    finally:
        rank_watch.stop_watch()


@contextmanager
def _name_lack_of_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MachineError(describe_lack_of_memory(error)) from error
        raise


def _classify_loss(error: Exception) -> str | None:
    """Returns how another rank was lost, or None if the error is of another kind."""
    if not isinstance(error, LOST_ERRORS):
        return None
    text = str(error)
    if any(part in text for part in TIMEOUT_MESSAGES):
        return "does not answer"
    return "has ended" if any(part in text for part in LOST_MESSAGES) else None


def _publish_last_words(text: str) -> None:
    with suppress(RuntimeError):
        _store().set(f"{STORE_PREFIX}{dist.get_rank()}", text)


def _publish_failure(text: str) -> None:
    """Publishes this rank's last words, also to the watches of ranks whose main threads cannot read them."""
    _publish_last_words(text)
    with suppress(RuntimeError):
        rank_watch.publish_verdict(_store(), f"another rank has failed.\n  rank {dist.get_rank()}: {text}")


def _store() -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    return store


def _explain_loss(kind: str) -> str:
    """Names the ranks that failed, with their last words; if there are none, the ranks that are silent."""
    _publish_last_words("")
    words = _run_with_timeout(2 * STORE_SECONDS, _collect_last_words)
    if words is None:
        why = "If it has said nothing itself, it was killed, or the network to its node is gone."
        return f"rank 0 {kind}: without it the ranks cannot meet. {why} {RESTART_HINT}"
    failures = [f"rank {rank}: {text}" for rank, text in words.items() if text]
    if failures:
        return "another rank has failed.\n  " + "\n  ".join(failures)
    silent = sorted(set(range(dist.get_world_size())) - set(words))
    if not silent:
        return f"a rank {kind}, and all are there now: the network between them was interrupted."
    which = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
    slow = "It hangs, is slower than timeout_minutes, or the network to its node is gone."
    why = "It was killed (memory? a signal?)." if kind == "has ended" else slow
    return f"{which} {kind}, without a word. {why} {RESTART_HINT}"


def _run_with_timeout(seconds: float, job: Callable[[], T]) -> T | None:
    """Returns the job's result, or None after `seconds`: without a network the store's client blocks forever."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(job()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _collect_last_words() -> dict[int, str] | None:
    """Waits for the last words of all ranks and returns them by rank; None if the store is gone with rank 0."""
    words: dict[int, str] = {}
    deadline = time.monotonic() + STORE_SECONDS
    ranks = range(dist.get_world_size())
    try:
        while time.monotonic() < deadline and len(words) < len(ranks) and not any(words.values()):
            for rank in ranks:
                if rank not in words and _store().check([f"{STORE_PREFIX}{rank}"]):
                    words[rank] = _store().get(f"{STORE_PREFIX}{rank}").decode()
            time.sleep(0.05)
    except RuntimeError:
        return None
    return words

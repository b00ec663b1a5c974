"""What ranks tell each other when one of them fails: why, through the store at which they met."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron_ligo.common import signal_handling
from megatron_ligo.common.errors import LigoError, LostRankError, Stopped

# How long a rank that has lost another waits for the last words of the rest.
SECONDS = 4.0
KEY = "megatron_ligo/last_words/"
# What gloo, nccl and the store say when another rank is not there, or not in time.
LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed",
    "Application timeout caused pair closure", "remote process exited",
)  # fmt: skip
AGAIN = "Started again, the run goes on from its last checkpoint."
LATE = ("Timed out waiting", "timed out", "Timeout", "timeout")
Lost = (RuntimeError, dist.DistError)

T = TypeVar("T")


@contextmanager
def report_failures() -> Iterator[None]:
    """Around a job of all ranks: who fails says so to the others; who loses another says which one, and why."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if not dist.is_initialized() or (isinstance(error, LigoError) and error.agreed):
            # They have not met, or they all know.
            raise
        kind = _loss(error)
        with signal_handling.deferred(SECONDS * 3):
            if kind is None:
                _say(f"{error}" or type(error).__name__)
                raise
            raise LostRankError(_verdict(kind)) from error


def _loss(error: Exception) -> str | None:
    """How another rank was lost, where that is what an error tells."""
    if not isinstance(error, Lost):
        return None
    text = str(error)
    if any(part in text for part in LATE):
        return "does not answer"
    return "has ended" if any(part in text for part in LOST) else None


def _say(text: str) -> None:
    with suppress(RuntimeError):
        _store().set(f"{KEY}{dist.get_rank()}", text)


def _store() -> dist.Store:
    store = dist.distributed_c10d._get_default_store()
    store.set_timeout(timedelta(seconds=SECONDS))
    return store


def _verdict(kind: str) -> str:
    """Which ranks failed, by their own last words; where none said any, which ones are silent."""
    _say("")
    words = _within(2 * SECONDS, _listen)
    if words is None:
        why = "If it has said nothing itself, it was killed, or the network to its node is gone."
        return f"rank 0 {kind}: without it the ranks cannot meet. {why} {AGAIN}"
    told = [f"rank {rank}: {text}" for rank, text in words.items() if text]
    if told:
        return "another rank has failed.\n  " + "\n  ".join(told)
    silent = sorted(set(range(dist.get_world_size())) - set(words))
    if not silent:
        return f"a rank {kind}, and all are there now: the network between them was interrupted."
    which = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
    slow = "It hangs, is slower than timeout_minutes, or the network to its node is gone."
    why = "It was killed (memory? a signal?)." if kind == "has ended" else slow
    return f"{which} {kind}, without a word. {why} {AGAIN}"


def _within(seconds: float, job: Callable[[], T]) -> T | None:
    """What a job gives; None where it takes longer: the store's client waits for ever once the network is gone."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(job()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _listen() -> dict[int, str] | None:
    """Last words by rank, waited for; None if the store is gone with rank 0."""
    words: dict[int, str] = {}
    deadline = time.monotonic() + SECONDS
    everyone = range(dist.get_world_size())
    try:
        while time.monotonic() < deadline and len(words) < len(everyone) and not any(words.values()):
            for rank in everyone:
                if rank not in words and _store().check([f"{KEY}{rank}"]):
                    words[rank] = _store().get(f"{KEY}{rank}").decode()
            time.sleep(0.05)
    except RuntimeError:
        return None
    return words

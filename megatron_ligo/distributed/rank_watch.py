"""A thread on each rank that ends it with a verdict if another rank is lost and the main thread cannot notice.

Under gloo a lost rank breaks the connections of its peers, and their collectives raise. Under nccl the peers stay
inside a CUDA call, until torch's own watchdog aborts them without a word. So each rank's thread writes a heartbeat into
the rendezvous store, through a client of its own, and looks at three things: the common verdict, the heartbeat of the
next rank, and whether its own main thread moves. Whoever finds a fault publishes the verdict. Each rank then has some
seconds to end by itself, before its thread prints the verdict and exits with code 2.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.common.errors import LigoError

PREFIX = "megatron_ligo/watch/"
VERDICT = f"{PREFIX}verdict"
DONE = "done"
RESTART_HINT = "Restarted, the run resumes from its last checkpoint."


@dataclass(frozen=True)
class WatchTimes:
    """Seconds between heartbeats, without one until a rank counts as lost, in one call until a main thread counts as
    stuck, and for the main thread to end by itself after a verdict."""

    beat: float = 1.0
    silent: float = 30.0
    stuck: float = 600.0
    grace: float = 8.0


class RankWatch:
    """The watch of one rank. Its thread ends with `stop`, or ends the process.

    store: a client of the rendezvous store that nobody else uses.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, times: WatchTimes):
        self.store, self.rank, self.world_size, self.times = store, rank, world_size, times
        store.set_timeout(timedelta(seconds=max(times.silent, 1.0)))
        self._next_rank = (rank + 1) % world_size
        self._next_beat: tuple[str, float] = ("", time.monotonic())
        self._position: tuple[object, float] = (None, time.monotonic())
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch: this rank may go. Rank 0, which holds the store, waits some seconds for the others."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(self.times.silent)
        if self._thread.is_alive():
            return
        deadline = time.monotonic() + 4 * self.times.beat
        with suppress(RuntimeError):
            self.store.set(self._beat_key(self.rank), DONE)
            while self.rank == 0 and time.monotonic() < deadline and not self._all_done():
                time.sleep(0.05)

    def _all_done(self) -> bool:
        keys = [self._beat_key(rank) for rank in range(self.world_size)]
        return self.store.check(keys) and all(value == DONE.encode() for value in self.store.multi_get(keys))

    def _run(self) -> None:
        beat = 0
        while not self._ended.wait(self.times.beat):
            beat += 1
            try:
                self.store.set(self._beat_key(self.rank), f"{beat}")
                if self._read(self._beat_key(0)) == DONE:
                    return
                verdict = self._read(VERDICT) or self._find_fault()
            except RuntimeError:
                verdict = f"rank 0 has ended, or the network to its node is gone. {RESTART_HINT}"
            if verdict:
                self._end_process(verdict)
                return

    def _find_fault(self) -> str | None:
        fault = self._describe_silence() or self._describe_standstill()
        return None if fault is None else publish_verdict(self.store, fault)

    def _describe_silence(self) -> str | None:
        beat, now = self._read(self._beat_key(self._next_rank)) or "", time.monotonic()
        if beat != self._next_beat[0]:
            self._next_beat = beat, now
        silence = now - self._next_beat[1]
        if beat == DONE or silence < self.times.silent:
            return None
        why = "It was killed (memory? a signal?), is stopped, or the network to its node is gone."
        return f"rank {self._next_rank} has ended, without a word for {silence:.0f} s. {why} {RESTART_HINT}"

    def _describe_standstill(self) -> str | None:
        frame, now = sys._current_frames().get(self._main), time.monotonic()
        # A loop of steps is nearly always seen at the same place: in the call that waits for the device.
        position = frame and (frame.f_code, frame.f_lasti, _progress.count)
        if position != self._position[0]:
            self._position = position, now
        duration = now - self._position[1]
        if frame is None or duration < self.times.stuck:
            return None
        place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        hint = "It, or the rank that it waits for, hangs, or is slower than timeout_minutes."
        return f"rank {self.rank} has not moved for {duration:.0f} s, at {place}. {hint} {RESTART_HINT}"

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    @staticmethod
    def _beat_key(rank: int) -> str:
        return f"{PREFIX}beat/{rank}"

    def _end_process(self, verdict: str) -> None:
        """Ends the process unless its main thread does so in time. Rank 0 goes first, and speaks for all."""
        if self._ended.wait(self.times.grace * (2 if self.rank else 1)):
            return
        print(f"rank {self.rank}: {verdict}" if self.rank else verdict, file=sys.stderr, flush=True)
        os._exit(LigoError.exit_code)


def publish_verdict(store: dist.Store, text: str) -> str:
    """Publishes why the job ends, unless another rank has done so already; returns what is published."""
    return store.compare_set(VERDICT, "", text).decode()


class Progress:
    count = 0


_progress = Progress()
_watches: list[RankWatch] = []


def mark_progress() -> None:
    """Tells the watch that the main thread moves; for the body of a loop that takes long in one place."""
    _progress.count += 1


def start_watch(times: WatchTimes) -> None:
    """Starts this rank's watch over the default process group, once per process, if there are other ranks."""
    if _watches or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store().clone()
    watch = RankWatch(store, dist.get_rank(), dist.get_world_size(), times)
    _watches.append(watch)
    watch.start()
    atexit.register(stop_watch)


def stop_watch() -> None:
    """Ends this rank's watch, if there is one: from here on the rank may end without being missed."""
    for watch in _watches:
        watch.stop()

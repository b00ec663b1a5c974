"""The metrics of a run: metrics.jsonl, TensorBoard events and a progress line."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from megatron_ligo.common import terminal_stream
from megatron_ligo.common.atomic_files import fsync_descriptor, write_bytes
from megatron_ligo.export.metrics_rows import METRICS_FILE, METRICS_STATE, RowsDigest, read_metrics

log = logging.getLogger(__name__)

# Columns that the progress line leaves out.
SILENT_KEYS = ("update_ratio", "skipped", "dropped_tokens")
SILENT_PREFIX = "expert_load_"
# The time left is estimated from this many recent steps.
RECENT_STEPS = 20

# Called on rank 0 after each step, with its row of metrics.jsonl: numbers, None for NaN, and the texts of TEXT_KEYS.
StepCallback = Callable[[dict[str, Any]], None]


class Metrics:
    """Writes each step to OUTPUT/metrics.jsonl (one JSON object per line), to TensorBoard and to the terminal.

    In the file, steps count from 1, and `tokens`, `flops` and `seconds` are cumulative, so that any two columns make a
    curve: tokens and FLOPs of all ranks, and seconds of the steps that no restart discarded. Does nothing unless
    `enabled`, which is set on rank 0 only. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        enabled: bool,
        total_steps: int,
        done_steps: int = 0,
        on_step: Sequence[StepCallback | None] = (),
        on_start: StepCallback | None = None,
        state: dict | None = None,
    ):
        """done_steps: step of the resumed checkpoint; rows of later steps are removed from the file.

        state: the run's, whose entry of the metrics states the tokens and FLOPs so far.

        on_step: called with each row. on_start: called with what `log_start` records, at step 0.
        """
        self.enabled = enabled
        self._on_step = [call for call in on_step if call]
        self._on_start = on_start
        self._start: dict[str, float] = {}
        self._totals = {"tokens": 0, "flops": 0, "seconds": 0.0}
        self._digest = RowsDigest()
        if not enabled:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        last = _truncate_rows(folder / METRICS_FILE, done_steps, self._digest)
        # The user may have accepted that rows are gone.
        last |= {
            key: value for key, value in (state or {}).get(METRICS_STATE, {}).items() if key in ("tokens", "flops")
        }
        self._totals.update({key: last[key] for key in self._totals if last.get(key) is not None})
        self._file = (folder / METRICS_FILE).open("a", encoding="utf-8")
        self._events = TensorBoardEvents(folder / "tensorboard", done_steps)
        self._line = ProgressLine(total_steps, done_steps)

    def log(
        self,
        step: int,
        loss: float,
        lr: float,
        tokens: int,
        flops: float,
        seconds: float,
        grad_norm: float,
        texts: Mapping[str, str] = {},
        **extra: float,
    ) -> None:
        """Records one step. tokens, flops, seconds: of this step alone. extra: more values, such as eval_loss.

        texts: the columns of TEXT_KEYS that the step has.
        """
        if not self.enabled:
            return
        for key, amount in (("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            self._totals[key] += amount
        row = {"step": step, "loss": loss, "lr": lr, **self._totals, "grad_norm": grad_norm, **extra, **self._start}
        self._start = {}
        # JSON has no NaN or Inf.
        finite: dict = {key: value if math.isfinite(value) else None for key, value in row.items()} | texts
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        self._digest.add(finite)
        shown = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens / max(seconds, 1e-9)}
        self._events.add({**shown, **extra}, step, texts)
        silent = {key for key in extra if key in SILENT_KEYS or key.startswith(SILENT_PREFIX)}
        self._line.show(step, loss, lr, tokens, seconds, {key: extra[key] for key in extra if key not in silent})
        for call in self._on_step:
            call(finite)

    def log_start(self, **values: float) -> None:
        """Records values from before the first step: at step 0, and in the file with the row of step 1 (`start_`)."""
        if not self.enabled:
            return
        self._events.add(values, 0)
        self._start = {f"start_{key}": value for key, value in values.items()}
        if self._on_start:
            self._on_start({"step": 0, **values})

    def bind(self) -> dict:
        """Syncs the rows so far to the disk and returns what a checkpoint states of them; {} unless enabled."""
        if not self.enabled:
            return {}
        self._file.flush()
        fsync_descriptor(self._file.fileno())
        totals = {key: self._totals[key] for key in ("tokens", "flops")}
        return {"rows": self._digest.rows, "digest": self._digest.value, **totals}

    def close(self) -> None:
        if not self.enabled:
            return
        self._line.stop()
        self._events.close()
        self._file.flush()
        fsync_descriptor(self._file.fileno())
        self._file.close()
        self.enabled = False

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _truncate_rows(path: Path, done_steps: int, digest: RowsDigest) -> dict:
    """Keeps only the rows of steps 1 to done_steps in the file, adds them to `digest`; returns the last, or {}."""
    if not path.exists():
        return {}
    rows = [row for row in read_metrics(path) if 1 <= row["step"] <= done_steps]
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    for row in rows:
        digest.add(row)
    return dict(rows[-1]) if rows else {}


class TensorBoardEvents:
    """Writes TensorBoard events until a write fails, which is logged once; metrics.jsonl has all values."""

    def __init__(self, folder: Path, done_steps: int):
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=done_steps + 1)

    def add(self, values: dict[str, float], step: int, texts: Mapping[str, str] = {}) -> None:
        try:
            for key, value in values.items() if self.writer else ():
                self.writer.add_scalar(key, value, step)
            for key, text in texts.items() if self.writer else ():
                self.writer.add_text(key, text, step)
        except OSError as error:
            self._disable(error)

    def close(self) -> None:
        try:
            if self.writer:
                self.writer.close()
        except OSError as error:
            self._disable(error)

    def _disable(self, error: OSError) -> None:
        log.warning("TensorBoard events are off from here: %s", error)
        self.writer = None


class ProgressLine:
    """Shows step, loss, learning rate, tokens per second and time left: a bar on a terminal, else plain lines."""

    def __init__(self, total: int, done: int):
        self.total = total
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        console = Console(file=terminal_stream.raw_stream(sys.stdout))
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("", total=total, completed=done)
            self.bar.start()

    def show(self, step: int, loss: float, lr: float, tokens: int, seconds: float, extra: dict[str, float]) -> None:
        self.recent.append(seconds)
        left = timedelta(seconds=round((self.total - step) * sum(self.recent) / len(self.recent)))
        more = "".join(f"  {key} {value:.4g}" for key, value in extra.items())
        text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens / max(seconds, 1e-9):.0f} tokens/s  left {left}{more}"
        if self.bar:
            self.bar.update(self.task, completed=step, description=text)
        else:
            print(f"step {step}/{self.total}  {text}", flush=True)

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()


def peak_memory_bytes() -> int:
    """Returns the peak memory of this process in bytes: allocated on its GPU, or resident on a CPU."""
    # Imported late: a report reads metrics without DeepSpeed.
    from megatron_ligo.distributed import device

    if not device.is_cpu():
        return int(device.get_accelerator().max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no VmHWM")

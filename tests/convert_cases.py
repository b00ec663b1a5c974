"""What runs in processes of its own: conversions that are killed, or whose memory is watched."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo import formats
from megatron_ligo.arch.dims import Dims
from megatron_ligo.convert import convert
from megatron_ligo.formats.base import Info, Reader, WriteOptions


class Drawn(Reader):
    """A large model whose tensors are computed when asked for, as a grown one's are."""

    format = "drawn"
    path = None

    def __init__(self, hidden_size: int, num_layers: int, vocab_size: int, dtype=torch.float32):
        self.dims = Dims(
            arch="llama", model_type="llama", num_layers=num_layers, hidden_size=hidden_size,
            ffn_size=hidden_size * 3, num_heads=8, num_kv_heads=2, head_dim=hidden_size // 8, vocab_size=vocab_size,
            max_positions=128, norm_eps=1e-5, rope_base=1e4,
        )  # fmt: skip
        self.dtype = dtype

    def info(self, key: str) -> Info:
        return Info(self.row(key).shape(self.dims), self.dtype)

    def read(self, key: str, kind: str = "weight") -> Tensor:
        generator = torch.Generator().manual_seed(sum(key.encode()))
        return torch.randn(self.row(key).shape(self.dims), generator=generator).to(self.dtype)

    def fingerprint(self) -> object:
        return "drawn"


def anonymous() -> int:
    """Bytes of this process that are of no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def watched(path: str, target: str, to: str) -> dict:
    """Converts (path "drawn": a computed model) and says how far anonymous memory rose."""
    source = Drawn(1024, 4, 40_000) if path == "drawn" else formats.open(path)
    largest = max(torch.Size(source.info(key).shape).numel() * 4 for key in source.keys())  # noqa: SIM118 - no dict
    start, peak, ended = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    convert(source, target, to)
    ended.set()
    thread.join()
    return {"peak": peak, "largest": largest}


def slow(path: str, target: str, to: str) -> dict:
    """A conversion that takes a while, to be killed in."""
    source = formats.open(path)
    read = source.read

    def slowly(key: str, kind: str = "weight") -> Tensor:
        time.sleep(0.01)
        return read(key, kind)

    source.read = slowly
    print("started", flush=True)
    made = convert(source, target, to, WriteOptions(extra={"shard_bytes": 200_000} if to == "hf" else {}))
    return {"tensors": len(made.tensors)}


if __name__ == "__main__":
    case, *arguments = sys.argv[1:]
    print(json.dumps({"watched": watched, "slow": slow}[case](*arguments)))

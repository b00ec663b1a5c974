"""Conversions that run in processes of their own, to be killed or to have their memory measured."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.bench.synthetic_reader import SyntheticReader
from megatron_ligo.bench.timing import track_anonymous_memory
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions

# 400 MB; the largest tensor is a twelfth of it.
LARGE = ModelConfig(
    arch="llama", model_type="llama", num_layers=27, hidden_size=512, ffn_size=1536, num_heads=8, num_kv_heads=2,
    head_dim=64, vocab_size=16_000, max_positions=128, norm_eps=1e-5, rope_base=1e4,
)  # fmt: skip
DELAY = 0.004


def options(to: str) -> WriteOptions:
    """Returns options for several ranks or shards, where a format has them."""
    layout = 2 if formats.get(to).has_layout else 1
    return WriteOptions(tp=layout, extra={"shard_bytes": 200_000} if to == "hf" else {})


def convert_and_measure(pipe: Connection, path: str | None, target: str, to: str) -> None:
    """Converts the checkpoint at a path (None: a computed model) and sends the peak of anonymous memory."""
    torch.set_num_threads(1)
    source = SyntheticReader(LARGE) if path is None else formats.open(path)
    with track_anonymous_memory() as memory:
        convert(source, target, to, options(to))
    pipe.send(memory.peak)


def convert_slowly(pipe: Connection, path: str, target: str, to: str) -> None:
    """Converts slowly, so that a kill interrupts it."""
    torch.set_num_threads(1)
    source = formats.open(path)
    read = source.read

    def delayed_read(key: str, kind: str = "weight") -> Tensor:
        time.sleep(DELAY)
        return read(key, kind)

    source.read = delayed_read
    pipe.send("started")
    convert(source, target, to, options(to))
    pipe.send("ended")

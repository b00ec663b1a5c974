"""Megatron-core's all-to-all dispatcher over gloo. It is built for GPUs; only its copies to the host are replaced."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_ligo.distributed import device

SPLITS = ("input_splits", "output_splits", "output_splits_tp")


@contextmanager
def all_to_all():
    """Layers that are built within send tokens to their experts' ranks alone."""
    replaced = {"cuda_dtoh_stream": "none", "_maybe_dtoh_and_synchronize": _keep_on_host}
    with (
        mock.patch.object(device, "token_dispatcher", lambda: "alltoall"),
        mock.patch.multiple(MoEAlltoAllTokenDispatcher, **replaced),
    ):
        yield


def _keep_on_host(dispatcher, point: str, tokens_per_expert=None):
    if point == dispatcher.cuda_dtoh_point:
        for name in SPLITS:
            sizes = getattr(dispatcher, name)
            setattr(dispatcher, name, sizes.numpy() if isinstance(sizes, torch.Tensor) else sizes)
    return tokens_per_expert

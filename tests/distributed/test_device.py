"""Each process takes its own GPU, and says so when it cannot. CUDA's calls are recorded: there is no GPU here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_ligo.common.errors import LayoutError
from megatron_ligo.distributed import device
from megatron_ligo.models.mcore.attention import FusedAttention

# The commands' own start, in a process whose accelerator is CUDA's; only the calls that need a GPU are replaced.
START = """
import json, os, sys
import torch
from megatron_ligo.common.errors import LayoutError
calls = []
torch.cuda.device_count = lambda: 4
torch.cuda.current_device = lambda: calls[-1] if calls else 0
torch.cuda.set_device = lambda index: calls.append(index if isinstance(index, int) else index.index)
from megatron_ligo.distributed import device, mesh
device.communication_backend = lambda: "gloo"
try:
    mesh.init_distributed()
except LayoutError as error:
    sys.exit(f"refused: {error}")
settings = {name: os.environ.get(name) for name in device.ALLOCATOR_SETTINGS}
print(json.dumps({"calls": calls, "device": str(device.current_device()), "allocator": settings}))
"""


def _start(local_rank: int) -> subprocess.CompletedProcess:
    job = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **job, "DS_ACCELERATOR": "cuda"}
    environment.pop("MASTER_PORT", None)
    command = [sys.executable, "-W", "ignore", "-c", START]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_takes_the_gpu_of_its_local_rank():
    process = _start(3)
    assert process.returncode == 0, process.stderr
    started = json.loads(process.stdout.splitlines()[-1])
    assert (started["calls"], started["device"]) == ([3], "cuda:3")
    assert started["allocator"] == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": None}


def test_more_processes_than_gpus_are_refused():
    process = _start(4)
    assert process.returncode == 1 and "refused: LOCAL_RANK 4: expected one of the node's 4 GPUs" in process.stderr


def test_gpus_that_torch_cannot_use_are_reported_unless_the_cpu_is_chosen(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    monkeypatch.setattr(device, "DRIVER_VERSION", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR")
    device.select_local_device()
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC version: 12\n")
    with pytest.raises(LayoutError) as refusal:
        device.select_local_device()
    assert "535.104.05" in refusal.value.problems[0].found and "DS_ACCELERATOR=cpu" in refusal.value.problems[0].hint
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    device.select_local_device()


@pytest.mark.parametrize("window", [None, (3, 0)])
def test_expanded_groups_give_the_same_attention(monkeypatch, window):
    from types import SimpleNamespace

    from megatron.core.transformer.enums import AttnMaskType

    attention = FusedAttention(
        SimpleNamespace(
            window_size=window,
            attention_softcap=None,
            query_scaling=None,
            attention_chunk=None,
            chunk_layers=None,
            l2_normalises_heads=False,
            no_rope_freq=None,
            window_attn_skip_freq=None,
            softmax_type="vanilla",
        ),
        1,
        AttnMaskType.causal,
    )
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(9, 2, 6, 4, generator=draw)
    key, value = (torch.randn(9, 2, 2, 4, generator=draw) for _ in range(2))
    grouped = attention(query, key, value, None)
    groups = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def record(*tensors, **options):
        groups.append(tensors[1].shape[1])
        return kernel(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    torch.testing.assert_close(attention(query, key, value, None), grouped, rtol=0, atol=1e-6)
    assert groups == [6], "the kernel was given groups that no fused kernel takes"

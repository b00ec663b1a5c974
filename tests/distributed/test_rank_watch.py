"""Ranks whose main threads sit in a call, as under nccl, end with a verdict when another rank is lost."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from megatron_ligo.distributed import rank_failures
from megatron_ligo.distributed.rank_failures import _classify_loss
from tests.reliability.commands import Command

JOB = """
import os, sys, time
import torch
import torch.distributed as dist
from megatron_ligo import cli
from megatron_ligo.common import errors
from megatron_ligo.distributed import mesh, rank_watch
from megatron_ligo.distributed.rank_failures import report_failures
from megatron_ligo.distributed.rank_watch import WatchTimes

def main():
    how, rank = sys.argv[1], cli.launcher_rank()
    with report_failures():
        mesh.init_distributed()
        dist.all_reduce(torch.ones(1))
        stuck = 3.0 if how == "hangs" else 60.0
        rank_watch.start_watch(WatchTimes(beat=0.2, silent=4.0, stuck=stuck, grace=1.0))
        time.sleep(1.0)
        if how == "ends":
            time.sleep(rank)
            return
        if how == "dies" and rank == 2 or how == "first dies" and rank == 0:
            os._exit(9)
        if how == "fails" and rank == 2:
            raise errors.DataError("a: expected b, found c.")
        if how == "hangs" and rank != 2:
            for _ in range(50):
                time.sleep(0.1)
                rank_watch.mark_progress()
        time.sleep(50)  # a call that never returns

if __name__ == "__main__":
    cli.run_command(main)
"""
CASES = {
    "ends": ([0, 0, 0], {}),
    "dies": ([2, 2, 9], {0: "rank 2 has ended, without a word", 1: "rank 1: rank 2 has ended"}),
    "first dies": ([9, 2, 2], {1: "rank 1: rank 0 has ended", 2: "rank 2: rank 0 has ended"}),
    "fails": ([2, 2, 2], {0: "another rank has failed.\n  rank 2: a: expected b, found c."}),
    "hangs": ([2, 2, 2], {0: "rank 2 has not moved for 3 s, at job.py:"}),
}


@pytest.mark.parametrize("how", CASES)
def test_a_rank_inside_a_call_ends_with_a_verdict(tmp_path, how):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    codes, words = CASES[how]
    begin = time.monotonic()
    with Command(script, [how], tmp_path / "log", 3) as run:
        assert run.exit_codes(30) == codes, [run.stderr(rank) for rank in range(3)]
        assert time.monotonic() - begin < 30
        for rank, text in words.items():
            assert text in run.stderr(rank)


# Texts of torch 2.13 and nccl 2.27, with the ends that nccl adds.
REMOTE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {kind}, NCCL version 2.27.7
{name}: {text}
Last error:
{last}"""
NCCL_ERRORS = [
    (
        "has ended",
        REMOTE.format(
            kind="remote process exited or there was a network error",
            name="ncclRemoteError",
            text="A call failed possibly due to a network error or a remote process exiting prematurely.",
            last="socketProgress: Connection closed by remote peer node7<40022>",
        ),
    ),
    (
        "has ended",
        REMOTE.format(
            kind="unhandled system error (run with NCCL_DEBUG=INFO for details)",
            name="ncclSystemError",
            text="System call (e.g. socket, malloc) or external library call failed or device error.",
            last="socketPollConnect: connect returned Connection refused, exceeded error retry count (35)",
        ),
    ),
    ("has ended", "NCCL communicator was aborted on rank 1. Original reason for failure was: ..."),
    (
        "does not answer",
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE) ran for 600012 "
        "milliseconds before timing out.",
    ),
    (None, REMOTE.format(kind="invalid usage", name="ncclInvalidUsage", text="", last="Duplicate GPU detected")),
    (None, REMOTE.format(kind="unhandled cuda error", name="ncclUnhandledCudaError", text="", last="Cuda failure 2")),
]


@pytest.mark.parametrize("case", range(len(NCCL_ERRORS)))
def test_errors_of_nccl_are_known(case):
    kind, text = NCCL_ERRORS[case]
    assert _classify_loss(dist.DistBackendError(text)) == kind


def test_the_last_error_of_nccl_is_named():
    detail = rank_failures.NCCL_DETAIL.search(NCCL_ERRORS[0][1])
    assert detail and detail[1] == "socketProgress: Connection closed by remote peer node7<40022>"

"""Ranks that lose another one report which and why; replicas that differ are detected."""

from __future__ import annotations

import time

import pytest

from tests.reliability import rank_cases
from tests.reliability.commands import Command
from tests.training.test_pretrain import base, settings  # noqa: F401 - base is a fixture

JOB = """
import os, sys
import torch
import torch.distributed as dist
from megatron_ligo import cli
from megatron_ligo.common import errors
from megatron_ligo.distributed import mesh
from megatron_ligo.distributed.rank_failures import report_failures

def main():
    with report_failures():
        mesh.init_distributed()
        dist.all_reduce(torch.ones(1))
        if cli.launcher_rank() == 2 and sys.argv[1] == "dies":
            os._exit(9)
        if cli.launcher_rank() == 2:
            raise errors.DataError("a: expected b, found c.")
        if cli.launcher_rank() == 3:
            dist.recv(torch.zeros(1), 1)
        dist.all_reduce(torch.ones(1))

if __name__ == "__main__":
    cli.run_command(main)
"""
WORDS = {
    "fails": ("another rank has failed.\n  rank 2: a: expected b, found c.", 2),
    "dies": ("rank 2 has ended, without a word", 9),
}


@pytest.mark.parametrize("how", WORDS)
def test_the_other_ranks_report_which_rank_failed_and_why(tmp_path, how):
    """Rank 3 waits for rank 1, which waits for rank 2."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    words, code = WORDS[how]
    begin = time.monotonic()
    with Command(script, [how], tmp_path / "log", 4) as run:
        assert run.exit_codes(60) == [2, 2, code, 2]
        print(f"{time.monotonic() - begin:.1f} s")
        assert words in run.stderr(0)
        assert not any("Traceback" in run.stderr(rank) for rank in range(4))


COPIES = {
    "DP2": (2, {}, "layernorm", "[0, 1]"),
    "TP2": (2, {"tp": 2}, "layernorm", "[0, 1]"),
    "PP2": (2, {"pp": 2}, "word_embeddings", "[0, 1]"),
}


@pytest.mark.parametrize("case", COPIES)
def test_replicas_that_differ_in_one_bit_are_named(pools, base, tmp_path, case):  # noqa: F811
    world, layout, kind, ranks = COPIES[case]
    table = settings(base, check_replicas_every=1, **layout)
    result = pools(world).run(
        rank_cases.pretrain_with_flipped_bit, settings=table, output=str(tmp_path), at=3, kind=kind
    )
    assert isinstance(result, str), "nothing was detected"
    assert "step 3: ranks that must hold the same numbers do not" in result
    assert kind in result and f"equal replicas on ranks {ranks}" in result
    assert not (tmp_path / "checkpoints/step_4").exists()

"""Two nodes joined by a cable: exact; a cut cable is reported on both; the run resumes once it is restored."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ligo.testing.forked_ranks import free_port
from tests.reliability.commands import ROOT, Run
from tests.reliability.conftest import STEPS
from tests.reliability.namespaces import ADDRESSES, INTERFACE, Nodes, NoNamespaces
from tests.reliability.test_kills import final_results, logged_steps

WORLD, MINUTES = 4, 0.2
FIT = ("fit.parallel.tp=2", "fit.parallel.pp=2")
TIMEOUT = f"fit.timeout_minutes={MINUTES}"
PRETRAIN = ("pretrain.parallel.tp=2", "pretrain.steps=6")
SHOWN = """
import os
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
os.write(1, f"here {' '.join(os.environ[name] for name in names)}\\n".encode())
"""


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    try:
        joined = Nodes()
    except (OSError, NoNamespaces) as error:
        pytest.skip(f"NO NETWORK NAMESPACES HERE, several nodes are NOT TESTED: {error}")
    yield joined
    joined.close()


def test_a_cut_cable_is_reported_on_both_nodes_and_the_run_resumes_exactly(nodes, config, whole, tmp_path):
    output = tmp_path / "two"
    with Run("fit", config, output, *FIT, TIMEOUT, world=WORLD, enter=nodes.enter()) as run:
        run.wait_for_step(6)
        nodes.cut()
        cut = time.monotonic()
        assert run.exit_codes(100) == [2] * WORLD
        assert time.monotonic() - cut < MINUTES * 60 + 40
        print(f"{time.monotonic() - cut:.0f} s until both sides have ended")
        words = [run.stderr(rank) for rank in range(WORLD)]
    assert all("ranks 2, 3" in words[rank] and "without a word" in words[rank] for rank in (0, 1)), words
    assert all("rank 0 does not answer" in words[rank] for rank in (2, 3)), words
    assert not any("Traceback" in text for text in words), words
    assert 6 <= len(logged_steps(output)) < STEPS
    nodes.mend()
    with Run("fit", config, output, *FIT, world=WORLD, enter=nodes.enter()) as run:
        assert run.exit_codes() == [0] * WORLD, run.stderr(0)
        assert "resumed after step" in run.stderr(0)
    assert final_results(output, "fit") == final_results(whole("fit", *FIT, world=WORLD), "fit")


def test_pretraining_over_two_nodes_is_exact(nodes, config, whole, tmp_path):
    with Run("pretrain", config, tmp_path / "two", *PRETRAIN, world=WORLD, enter=nodes.enter()) as run:
        assert run.exit_codes() == [0] * WORLD, run.stderr(0)
    one = whole("pretrain", *PRETRAIN, world=WORLD)
    assert final_results(tmp_path / "two", "pretrain") == final_results(one, "pretrain")


def test_the_script_for_a_node_starts_its_ranks(nodes, tmp_path):
    """Calls launch_scripts/node.sh on each node as a user would."""
    hosts, script, port = tmp_path / "hosts", tmp_path / "shown.py", str(free_port())
    hosts.write_text("a slots=2\nb slots=2\n")
    script.write_text(SHOWN)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "INTERFACE": INTERFACE, "PORT": port}
    started = []
    for node in range(2):
        command = ["bash", "launch_scripts/node.sh", str(hosts), str(node), ADDRESSES[0], str(script)]
        inside = nodes.inside(node, *command)
        started.append(subprocess.Popen(inside, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1))
    for node, running in enumerate(started):
        stdout, stderr = running.communicate(timeout=200)
        assert running.returncode == 0, stderr
        ranks = sorted(line.split()[1:] for line in stdout.splitlines() if line.startswith("here"))
        shared = [str(WORLD), ADDRESSES[0], port, INTERFACE, "1"]
        assert ranks == [[str(2 * node + local), str(local), *shared] for local in range(2)]

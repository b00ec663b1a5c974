"""Two nodes on one machine: network namespaces with their own addresses, joined by a veth pair.

The host's network is untouched. Needs permission to create namespaces (root, or a container that allows it).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "ligo0"
RANKS_PER_NODE = 2
NETWORK_NAMESPACE = 0x40000000  # CLONE_NEWNET


class NoNamespaces(Exception):
    """Namespaces cannot be created on this machine."""


class Nodes:
    """Two namespaces, each held by a sleeping process; the cable between them can be cut and restored."""

    def __init__(self) -> None:
        self.holders = [subprocess.Popen(["unshare", "--net", "sleep", "900"]) for _ in ADDRESSES]
        try:
            self._wait_for_namespaces()
            peer = str(self.holders[1].pid)
            self._on(0, "ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", peer)
            for node, address in enumerate(ADDRESSES):
                self._on(node, "ip", "link", "set", "lo", "up")
                self._on(node, "ip", "addr", "add", f"{address}/24", "dev", INTERFACE)
                self._on(node, "ip", "link", "set", INTERFACE, "up")
        except (OSError, NoNamespaces):
            self.close()
            raise

    def _wait_for_namespaces(self) -> None:
        own = Path("/proc/self/ns/net").readlink()
        deadline = time.monotonic() + 5
        for holder in self.holders:
            while (path := Path(f"/proc/{holder.pid}/ns/net")).exists() and path.readlink() == own:
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise NoNamespaces(f"unshare --net ended with {holder.poll()}")
                time.sleep(0.02)

    def _on(self, node: int, *command: str) -> None:
        done = subprocess.run(self.inside(node, *command), capture_output=True, text=True)
        if done.returncode:
            raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")

    def enter(self) -> Callable[[int], None]:
        """Returns a function that moves the calling rank to its node."""
        return partial(_enter, [holder.pid for holder in self.holders])

    def inside(self, node: int, *command: str) -> list[str]:
        """Returns the command line that runs a command on a node."""
        return ["nsenter", "-t", str(self.holders[node].pid), "-n", *command]

    def cut(self) -> None:
        self._on(0, "ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        self._on(0, "ip", "link", "set", INTERFACE, "up")

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()


def _enter(holders: list[int], rank: int) -> None:
    """Sets up a rank as a launcher on its node would."""
    node, local = divmod(rank, RANKS_PER_NODE)
    with Path(f"/proc/{holders[node]}/ns/net").open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NETWORK_NAMESPACE):
            raise OSError(ctypes.get_errno(), "setns")
    os.environ.update(MASTER_ADDR=ADDRESSES[0], LOCAL_RANK=str(local), GLOO_SOCKET_IFNAME=INTERFACE)

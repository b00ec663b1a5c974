"""Hostfiles of a run over several nodes: read strictly, and compared with the processes that were started.

DeepSpeed's launcher takes a hostfile that does not exist for none, and trains on one node alone.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from megatron_ligo.common.atomic_files import read_text
from megatron_ligo.common.errors import ConfigError, ErrorCollector, LayoutError, Problem

# Set by the launch scripts: the processes that the hostfile promises.
WORLD_SIZE = "LIGO_WORLD_SIZE"
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
LAUNCHER = "deepspeed"
# A rank's parent is DeepSpeed's launcher on the node, whose parent has the hostfile in its command.
GENERATIONS = 3
LINE = re.compile(r"(\S+)\s+slots=(\d+)(\s+#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Returns the processes of each node, in order. Raises ConfigError with every fault of the file."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(Problem(f"hostfile {path}", "a readable text file", found, "Check the path.")) from None
    errors, hosts = ErrorCollector(f"hostfile {path}", ConfigError), {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if not match:
            errors.add(f"line {number}", "NAME slots=PROCESSES", repr(line))
        elif match[1] in hosts:
            errors.add(f"line {number}", "each node once", f"{match[1]} again", "Add up its slots on one line.")
        elif not int(match[2]):
            errors.add(f"line {number}", "at least 1 slot", 0, "Remove a node without processes.")
        else:
            hosts[match[1]] = int(match[2])
    if not hosts and not errors.problems:
        errors.add("lines", "one line per node", "none")
    errors.raise_if_any()
    return hosts


def check_node(hosts: dict[str, int], rank: int, path: Path) -> None:
    """Raises LayoutError if this machine cannot be node `rank` of the hostfile at `path`."""
    names, errors = list(hosts), ErrorCollector(f"node rank {rank} of hostfile {path}", LayoutError)
    if not 0 <= rank < len(names):
        errors.add("node rank", f"0 to {len(names) - 1}, as the file has {len(names)} nodes", rank)
        errors.raise_if_any()
    own = {socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn()}
    listed = [number for number, name in enumerate(names) if name in own]
    if listed and rank not in listed:
        errors.add(
            "this host", names[rank], f"{names[listed[0]]}, which is node rank {listed[0]}", "Give each node its own."
        )
    devices = len(list(NVIDIA_DEVICES.iterdir())) if NVIDIA_DEVICES.is_dir() else 0
    slots = hosts[names[rank]]
    if devices and slots > devices and os.environ.get("DS_ACCELERATOR") != "cpu":
        errors.add("slots", f"at most the {devices} GPUs of this node", slots)
    errors.raise_if_any()


def check_world_size() -> None:
    """Raises LayoutError if fewer or more processes were started than the launch's hostfile says.

    That is LIGO_WORLD_SIZE, or the hostfile in the command of the launcher that has started this process.
    """
    promised, world = os.environ.get(WORLD_SIZE), os.environ.get("WORLD_SIZE", "1")
    if promised is not None and promised != world:
        hint = "Start every node with the same hostfile."
        raise LayoutError(Problem("processes", f"the {promised} of the hostfile", world, hint))
    path = _launchers_hostfile()
    if path is not None and not path.is_file():
        raise LayoutError(Problem(f"hostfile {path}", "a file", "none: DeepSpeed would train on this node alone"))


def _launchers_hostfile() -> Path | None:
    """Returns the --hostfile of DeepSpeed's launcher above this process on the same node, if it has one."""
    process = os.getppid()
    for _ in range(GENERATIONS):
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
            folder = Path(f"/proc/{process}/cwd").readlink()
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            return None
        if not any(LAUNCHER in word for word in words[:3]):
            continue
        for word, following in zip(words, [*words[1:], ""], strict=True):
            name, equals, value = word.partition("=")
            if name in ("-H", "--hostfile"):
                return folder / (value if equals else following)
    return None

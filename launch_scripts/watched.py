"""Runs a command and prints its duration and the peak memory of all its processes together.

    python launch_scripts/watched.py COMMAND...

Memory is the proportional set size, sampled twice a second: pages that processes share count once.
"""

import subprocess
import sys
import time

import psutil


def sum_memory(root: psutil.Process) -> int:
    """Returns the bytes of a process and its descendants."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # the process has just ended
    return total


def main() -> int:
    start, peak = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as command:
        root = psutil.Process(command.pid)
        while command.poll() is None:
            try:
                peak = max(peak, sum_memory(root))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
    print(f"   {time.monotonic() - start:.0f} s, peak {peak / 2**30:.2f} GiB", flush=True)
    return command.returncode


if __name__ == "__main__":
    sys.exit(main())

"""Runs a command, and says how long it took and how much memory it and all its processes held at once, at most.

    python launch_scripts/watched.py COMMAND...

Memory is the proportional set size, looked at twice a second: what processes share is counted once.
"""

import subprocess
import sys
import time

import psutil


def held(root: psutil.Process) -> int:
    """Bytes of a process and its descendants."""
    total = 0
    for process in (root, *root.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has just ended
    return total


def main() -> int:
    began, peak = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as running:
        root = psutil.Process(running.pid)
        while running.poll() is None:
            try:
                peak = max(peak, held(root))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.5)
    print(f"   {time.monotonic() - began:.0f} s, at most {peak / 2**30:.2f} GiB", flush=True)
    return running.returncode


if __name__ == "__main__":
    sys.exit(main())

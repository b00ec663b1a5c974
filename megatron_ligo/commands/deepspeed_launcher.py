"""DeepSpeed's launcher of one node without its lines: `python -m megatron_ligo.commands.deepspeed_launcher N PORT ...`.

The module that starts the ranks, `deepspeed.launcher.launch`, runs in this process. The command `deepspeed` would start
it as a child, for which nobody looks while it imports, and whose death by a signal it returns as 0.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys

from megatron_ligo.common import library_log
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION

VISIBLE = "CUDA_VISIBLE_DEVICES"


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C while the libraries are imported ends this process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    library_log.install()

    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import launch

    device = get_accelerator().device_name()
    if device != "cpu" or not DRIVER_VERSION.is_file():
        # Else each process looks for devices again, and says so. With a driver, only the user may choose the CPU.
        os.environ.setdefault("DS_ACCELERATOR", device)
    processes, port, *words = sys.argv[1:]
    world = json.dumps({"localhost": _device_ids(int(processes), device)}).encode()
    options = [f"--world_info={base64.urlsafe_b64encode(world).decode()}", f"--master_port={port}"]
    sys.argv[1:] = [*options, "--log_level=error", "--module", *words]
    received, wakeup = os.pipe()
    for descriptor in (received, wakeup):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        launch.main()
    except SystemExit:
        # DeepSpeed's own code after a signal is 1, that of a bug.
        numbers = _read_signals(received)
        if numbers:
            sys.exit(128 + numbers[0])
        raise


def _read_signals(descriptor: int) -> bytes:
    """Returns the numbers of the signals that this process has handled, in order."""
    try:
        return os.read(descriptor, 1 << 10)
    except BlockingIOError:
        return b""


def _device_ids(processes: int, device: str) -> list[str]:
    """Returns the device of each process: the first of CUDA_VISIBLE_DEVICES, or of all."""
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    if device != "cpu" and 0 < len(visible) < processes:
        print(f"{VISIBLE}: expected {processes} or more devices, found {','.join(visible)}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    return visible[:processes] if len(visible) >= processes else [f"{number}" for number in range(processes)]


if __name__ == "__main__":
    main()

"""DeepSpeed's launcher on this machine without its lines: `python -m megatron_ligo.commands.deepspeed_launcher ...`."""

from __future__ import annotations

import os
import sys

from megatron_ligo.common import library_log
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION


def main() -> None:
    library_log.install()

    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    device = get_accelerator().device_name()
    if device != "cpu" or not DRIVER_VERSION.is_file():
        # Else each process looks for devices again, and says so. With a driver, only the user may choose the CPU.
        os.environ.setdefault("DS_ACCELERATOR", device)
    runner.main(["--log_level", "error", *sys.argv[1:]])


if __name__ == "__main__":
    main()

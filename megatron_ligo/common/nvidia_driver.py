"""Whether this machine has NVIDIA's kernel driver; needs no torch."""

from __future__ import annotations

from pathlib import Path

# Exists while the driver is loaded.
DRIVER_VERSION = Path("/proc/driver/nvidia/version")

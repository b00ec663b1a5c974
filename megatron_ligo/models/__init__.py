"""Models of Megatron-core's layers, whole and factored; and their FLOPs and initial weights, without either package."""

import importlib.util

# A plan counts FLOPs without these packages. Where they are, the device must precede Megatron-core's imports.
if importlib.util.find_spec("deepspeed") and importlib.util.find_spec("megatron"):
    from megatron_ligo.distributed import device  # noqa: F401

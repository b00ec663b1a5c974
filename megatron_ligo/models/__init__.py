from megatron_ligo.distributed import device  # noqa: F401 - must precede Megatron-core's imports

from megatron_ligo.distributed import device  # noqa: F401 - before anything of Megatron-core's

from megatron_ligo.parallel import accelerator  # noqa: F401 - before anything of Megatron-core's

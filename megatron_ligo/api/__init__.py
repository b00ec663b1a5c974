"""The functions of `import megatron_ligo as ligo`: thin, over the same code as the commands."""

"""Runs `ligo` as a module: `python -m megatron_ligo`, or `deepspeed --module megatron_ligo fit ...`."""

from megatron_ligo.commands import main

if __name__ == "__main__":
    main()

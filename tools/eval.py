"""Runs `ligo eval`, as a script for launchers and clones."""

from megatron_ligo import cli
from megatron_ligo.commands import script_main

main = script_main("eval")

if __name__ == "__main__":
    cli.run_command(main)

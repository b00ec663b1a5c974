"""Imported first by a process that only imports others' modules: their warnings stay off the terminal."""

from megatron_ligo.common import library_log

library_log.install()

"""What every rank would import at its first step, imported once in the process that ranks are forked from."""

from __future__ import annotations

import gc

import torch._subclasses.schema_check_mode
import torch.profiler._cupti_monitor
import torch.utils.serialization  # noqa: F401

import megatron_ligo.training.fit
import megatron_ligo.training.pretrain  # noqa: F401
from megatron_ligo.checkpoint.formats import formats

formats()
# DeepSpeed and the engines collect garbage: without this each rank walks, and so copies, all that was imported.
gc.collect()
gc.freeze()

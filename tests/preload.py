"""Slow imports of the process from which ranks are forked (tests/rank_pool.py)."""

import deepspeed
import deepspeed.pipe  # noqa: F401
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import megatron_ligo.training.fit
import megatron_ligo.training.pretrain  # noqa: F401

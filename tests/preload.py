"""Slow imports of the process from which ranks are forked (tests/rank_pool.py)."""

import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import megatron_ligo.testing.preload  # noqa: F401  # last: it freezes all objects

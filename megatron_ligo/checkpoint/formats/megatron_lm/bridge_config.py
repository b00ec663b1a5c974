"""The run_config.yaml with which Megatron-Bridge's AutoBridge builds the model of a distributed checkpoint.

AutoBridge looks for it in a folder iter_NNNNNNN, and reads its section `model`: the fields of GPTModelProvider.
"""

from __future__ import annotations

import torch
import yaml

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import scaling_kind
from megatron_ligo.checkpoint.formats.megatron_lm.run_config import CALL, MODELS, SECTION, TARGET
from megatron_ligo.common.errors import ConfigError, Problem

# The families whose provider is Megatron-Bridge's plain GPTModelProvider.
MODEL_TYPES = ("llama", "mistral", "qwen2")


def to_run_config(model_config: ModelConfig, padded_vocab_size: int, dtype: torch.dtype) -> str:
    """Returns the text of run_config.yaml. Raises ConfigError for a model that its fields do not describe."""
    kind, scaling = scaling_kind(model_config.rope_scaling), model_config.rope_scaling or {}
    if model_config.model_type not in MODEL_TYPES or kind not in ("default", "llama3", "linear"):
        found = f"{model_config.model_type}{'' if kind == 'default' else f' with {kind} rotary positions'}"
        hint = "Leave the option out, and let Megatron-Bridge import the Hugging Face folder."
        raise ConfigError(Problem("option bridge", f"a model of {', '.join(MODEL_TYPES)}", found, hint))
    window = model_config.sliding_window
    fields = {
        TARGET: MODELS[0],
        "num_layers": model_config.num_layers,
        "hidden_size": model_config.hidden_size,
        "ffn_hidden_size": model_config.ffn_size,
        "num_attention_heads": model_config.num_heads,
        "num_query_groups": model_config.num_kv_heads,
        "kv_channels": model_config.head_dim,
        "seq_length": model_config.max_positions,
        "vocab_size": padded_vocab_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model_config.norm_eps,
        "gated_linear_unit": True,
        "activation_func": _reference("torch.nn.functional.silu"),
        "add_bias_linear": model_config.output_bias,
        "add_qkv_bias": model_config.qkv_bias,
        "share_embeddings_and_output_weights": model_config.tied,
        "position_embedding_type": "rope",
        "rotary_base": int(model_config.rope_base),
        "rotary_percent": model_config.rotary_fraction,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "params_dtype": _reference(str(dtype)),
    }
    if window is not None:
        fields["window_size"] = [window - 1, 0]
    if kind == "llama3":
        fields |= {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}
    if kind == "linear":
        fields["seq_len_interpolation_factor"] = scaling["factor"]
    return yaml.safe_dump({SECTION: fields}, sort_keys=False)


def _reference(name: str) -> dict[str, object]:
    return {TARGET: name, CALL: False}

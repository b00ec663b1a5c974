"""Llama and the families that share its network: Llama 2/3, SmolLM2, Mistral and Qwen2 (with biases on q, k and v).

RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU. Llama may have biases on all linears
of its attention, of its feed-forward blocks, or of both.
"""

from collections.abc import Iterator

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    KEY_OUTPUT,
    QUERY_OUTPUT,
    RESIDUAL_GAIN,
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    VALUE_INPUT,
    VALUE_OUTPUT,
    VOCAB_OUTPUT,
)
from megatron_ligo.arch.common_params import CAUSAL, DROPOUT, Locations, bias_of, weight_of
from megatron_ligo.arch.spec import Axis, FormatLocation, Pack, ParamSpec, Role


def _module(hf: str, mcore: str, gguf: str, meta: str) -> Locations:
    return {
        "hf": FormatLocation(hf),
        "mcore": FormatLocation(mcore),
        "gguf": FormatLocation(gguf),
        "fairscale": FormatLocation(meta),
        # torchtitan has Meta's names, but for the head's.
        "torchtitan": FormatLocation("lm_head" if meta == "output" else meta),
    }


def _layer_module(hf: str, mcore: str, gguf: str, meta: str) -> Locations:
    return _module(f"model.layers.{{}}.{hf}", f"decoder.layers.{{}}.{mcore}", f"blk.{{}}.{gguf}", f"layers.{{}}.{meta}")


def _qkv_module(part: int, hf: str, gguf: str, meta: str, interleaved: bool) -> Locations:
    """Returns the locations of q, k or v (part 0, 1 or 2). interleaved: in GGUF and Meta's files."""
    return {
        "hf": FormatLocation(f"model.layers.{{}}.self_attn.{hf}"),
        "mcore": FormatLocation("decoder.layers.{}.self_attention.linear_qkv", Pack.GROUPED, part, num_parts=3),
        "gguf": FormatLocation(f"blk.{{}}.{gguf}", interleaved=interleaved),
        "fairscale": FormatLocation(f"layers.{{}}.attention.{meta}", interleaved=interleaved),
        "torchtitan": FormatLocation(f"layers.{{}}.attention.qkv_linear.{meta}", interleaved=interleaved),
    }


def _ffn_module(part: int, hf: str, gguf: str, meta: str) -> Locations:
    """Returns the locations of gate or up (part 0 or 1), which Megatron-core fuses."""
    return {
        "hf": FormatLocation(f"model.layers.{{}}.mlp.{hf}"),
        "mcore": FormatLocation("decoder.layers.{}.mlp.linear_fc1", Pack.STACKED, part, num_parts=2),
        "gguf": FormatLocation(f"blk.{{}}.{gguf}"),
        "fairscale": FormatLocation(f"layers.{{}}.feed_forward.{meta}"),
        "torchtitan": FormatLocation(f"layers.{{}}.feed_forward.{meta}"),
    }


def _bias(key: str, role: Role, axis: Axis, module: Locations, flag: str) -> ParamSpec:
    """Returns an optional bias. Meta's format and torchtitan's Llama have none. flag: the field that states it."""
    without = ("fairscale", "torchtitan")
    locations = {name: location for name, location in bias_of(module).items() if name not in without}
    tp_dim = None if axis is RESIDUAL_OUTPUT else 0
    return ParamSpec(key, role, (axis,), tp_dim, locations, is_bias=True, requires=flag)


def params_with(*flags: str) -> Iterator[ParamSpec]:
    """Yields Llama's parameters, of the biases only those that these fields state."""
    return (param for param in LLAMA.params if not param.requires or param.requires in flags)


EMBEDDING = _module("model.embed_tokens", "embedding.word_embeddings", "token_embd", "tok_embeddings")
ATTENTION_NORM = _layer_module("input_layernorm", "input_layernorm", "attn_norm", "attention_norm")
QUERY = _qkv_module(0, "q_proj", "attn_q", "wq", interleaved=True)
KEY = _qkv_module(1, "k_proj", "attn_k", "wk", interleaved=True)
VALUE = _qkv_module(2, "v_proj", "attn_v", "wv", interleaved=False)
ATTENTION_OUTPUT = _layer_module("self_attn.o_proj", "self_attention.linear_proj", "attn_output", "attention.wo")
FFN_NORM = _layer_module("post_attention_layernorm", "pre_mlp_layernorm", "ffn_norm", "ffn_norm")
GATE = _ffn_module(0, "gate_proj", "ffn_gate", "w1")
UP = _ffn_module(1, "up_proj", "ffn_up", "w3")
DOWN = _layer_module("mlp.down_proj", "mlp.linear_fc2", "ffn_down", "feed_forward.w2")
FINAL_NORM = _module("model.norm", "decoder.final_layernorm", "output_norm", "norm")
HEAD = _module("lm_head", "output_layer", "output", "output")

PLAIN_FIELDS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "rope_theta": "rope_base",
    "rope_scaling": "rope_scaling",
    "sliding_window": "sliding_window",
}
# The keys of optional biases. One states those of q, k, v and the output projection.
ATTENTION_BIAS, MLP_BIAS = {"attention_bias": "qkv_bias"}, {"mlp_bias": "mlp_bias"}
OUTPUT_FOLLOWS = {"output_bias": "qkv_bias"}
ATTENTION_BIASES = ("qkv_bias", "output_bias")

LLAMA = Architecture(
    name="llama",
    norm="rms",
    model_types={
        "llama": {"LlamaForCausalLM": ()},
        "mistral": {"MistralForCausalLM": ()},
        "qwen2": {"Qwen2ForCausalLM": ()},
    },
    params=(
        ParamSpec("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, weight_of(EMBEDDING)),
        ParamSpec("layers.{}.norm1", Role.ATTENTION_NORM, (RESIDUAL_GAIN,), None, weight_of(ATTENTION_NORM)),
        ParamSpec("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, weight_of(QUERY)),
        ParamSpec("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, weight_of(KEY)),
        ParamSpec("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, weight_of(VALUE)),
        _bias("layers.{}.q_bias", Role.QUERY, QUERY_OUTPUT, QUERY, "qkv_bias"),
        _bias("layers.{}.k_bias", Role.KEY, KEY_OUTPUT, KEY, "qkv_bias"),
        _bias("layers.{}.v_bias", Role.VALUE, VALUE_OUTPUT, VALUE, "qkv_bias"),
        ParamSpec("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, weight_of(ATTENTION_OUTPUT)),
        _bias("layers.{}.o_bias", Role.ATTENTION_OUTPUT, RESIDUAL_OUTPUT, ATTENTION_OUTPUT, "output_bias"),
        ParamSpec("layers.{}.norm2", Role.FFN_NORM, (RESIDUAL_GAIN,), None, weight_of(FFN_NORM)),
        ParamSpec("layers.{}.gate", Role.FFN_GATE, (FFN_OUTPUT, RESIDUAL_INPUT), 0, weight_of(GATE)),
        ParamSpec("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, weight_of(UP)),
        ParamSpec("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, weight_of(DOWN)),
        _bias("layers.{}.gate_bias", Role.FFN_GATE, FFN_OUTPUT, GATE, "mlp_bias"),
        _bias("layers.{}.up_bias", Role.FFN_UP, FFN_OUTPUT, UP, "mlp_bias"),
        _bias("layers.{}.down_bias", Role.FFN_DOWN, RESIDUAL_OUTPUT, DOWN, "mlp_bias"),
        ParamSpec("final_norm", Role.FINAL_NORM, (RESIDUAL_GAIN,), None, weight_of(FINAL_NORM), feeds_head=True),
        ParamSpec("head", Role.HEAD, (VOCAB_OUTPUT, RESIDUAL_INPUT), 0, weight_of(HEAD), tied_to="embed"),
    ),
    hf_fields=PLAIN_FIELDS | ATTENTION_BIAS | MLP_BIAS,
    coupled_fields={"llama": OUTPUT_FOLLOWS},
    gguf_fields={
        "block_count": "num_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "ffn_size",
        "attention.head_count": "num_heads",
        "attention.head_count_kv": "num_kv_heads",
        "attention.key_length": "head_dim",
        "vocab_size": "vocab_size",
        "context_length": "max_positions",
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "rope.freq_base": "rope_base",
    },
    required_hf_values={"hidden_act": "silu", "use_sliding_window": False},
    foreign_hf_keys={
        "llama": ("sliding_window", "use_sliding_window"),
        "mistral": ("mlp_bias", "attention_bias", "use_sliding_window"),
        "qwen2": ("mlp_bias", "attention_bias"),
    },
    hf_pattern_keys={"qwen2": ("layer_types", "use_sliding_window", "max_window_layers")},
    implied_sizes={
        "llama": {"sliding_window": None},
        "mistral": {"qkv_bias": False, "mlp_bias": False},
        "qwen2": {"qkv_bias": True, "mlp_bias": False},
    },
    expert_types={"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe"},
    ignored_names={"hf": ("model.layers.*.self_attn.rotary_emb.inv_freq",)},
    # Ernie 4.5 has Llama's tensors and keys, and use_bias: its rotary positions turn other pairs.
    hf_fixed=CAUSAL | {"rope_interleaved": (False, None), "use_mrope": (False, None), "use_bias": ()},
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), DROPOUT),
        "is_decoder": "the attention is causal anyway",
        "is_llama_config": "a record of the model's origin (SmolLM)",
        "max_sequence_length": "an early name for the context length, which transformers does not read",
        "max_window_layers": "the layers with a window, of which there are none without use_sliding_window",
        "pretraining_tp": "how the released model was trained; the product of the parts is the whole product",
    },
)

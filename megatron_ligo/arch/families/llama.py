"""Llama and the families that share its network: Llama 2/3, SmolLM2, Mistral (and Qwen2, with biases on q, k, v).

RMSNorm before each block, rotary positions, grouped-query attention, SwiGLU, no biases but Qwen2's.
"""

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
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role


def _slots(
    hf: str, mcore: str, gguf: str, meta: str, *, pack=Pack.NONE, part=0, num_parts=1, interleaved=False
) -> dict:
    """meta: "" where Meta's Llama has no such parameter."""
    slots = {
        "hf": FormatLocation(hf),
        "mcore": FormatLocation(mcore, pack, part, num_parts),
        "gguf": FormatLocation(gguf, interleaved=interleaved),
    }
    return slots | ({"fairscale": FormatLocation(meta, interleaved=interleaved)} if meta else {})


def _layer(hf: str, mcore: str, gguf: str, meta: str, **packing) -> dict:
    meta = meta and f"layers.{{}}.{meta}"
    return _slots(f"model.layers.{{}}.{hf}", f"decoder.layers.{{}}.{mcore}", f"blk.{{}}.{gguf}", meta, **packing)


QKV = "self_attention.linear_qkv"

LLAMA = Architecture(
    name="llama",
    norm="rms",
    model_types={
        "llama": {"LlamaForCausalLM": ()},
        "mistral": {"MistralForCausalLM": ()},
        "qwen2": {"Qwen2ForCausalLM": ()},
    },
    params=(
        ParamSpec(
            "embed",
            Role.WORD_EMBEDDING,
            (VOCAB_OUTPUT, RESIDUAL_OUTPUT),
            0,
            _slots(
                "model.embed_tokens.weight",
                "embedding.word_embeddings.weight",
                "token_embd.weight",
                "tok_embeddings.weight",
            ),
        ),
        ParamSpec(
            "layers.{}.norm1",
            Role.ATTENTION_NORM,
            (RESIDUAL_GAIN,),
            None,
            _layer("input_layernorm.weight", "input_layernorm.weight", "attn_norm.weight", "attention_norm.weight"),
        ),
        ParamSpec(
            "layers.{}.q",
            Role.QUERY,
            (QUERY_OUTPUT, RESIDUAL_INPUT),
            0,
            _layer(
                "self_attn.q_proj.weight",
                f"{QKV}.weight",
                "attn_q.weight",
                "attention.wq.weight",
                pack=Pack.GROUPED,
                part=0,
                num_parts=3,
                interleaved=True,
            ),
        ),
        ParamSpec(
            "layers.{}.k",
            Role.KEY,
            (KEY_OUTPUT, RESIDUAL_INPUT),
            0,
            _layer(
                "self_attn.k_proj.weight",
                f"{QKV}.weight",
                "attn_k.weight",
                "attention.wk.weight",
                pack=Pack.GROUPED,
                part=1,
                num_parts=3,
                interleaved=True,
            ),
        ),
        ParamSpec(
            "layers.{}.v",
            Role.VALUE,
            (VALUE_OUTPUT, RESIDUAL_INPUT),
            0,
            _layer(
                "self_attn.v_proj.weight",
                f"{QKV}.weight",
                "attn_v.weight",
                "attention.wv.weight",
                pack=Pack.GROUPED,
                part=2,
                num_parts=3,
            ),
        ),
        ParamSpec(
            "layers.{}.q_bias",
            Role.QUERY,
            (QUERY_OUTPUT,),
            0,
            _layer(
                "self_attn.q_proj.bias",
                f"{QKV}.bias",
                "attn_q.bias",
                "",
                pack=Pack.GROUPED,
                part=0,
                num_parts=3,
                interleaved=True,
            ),
            requires="qkv_bias",
            is_bias=True,
        ),
        ParamSpec(
            "layers.{}.k_bias",
            Role.KEY,
            (KEY_OUTPUT,),
            0,
            _layer(
                "self_attn.k_proj.bias",
                f"{QKV}.bias",
                "attn_k.bias",
                "",
                pack=Pack.GROUPED,
                part=1,
                num_parts=3,
                interleaved=True,
            ),
            requires="qkv_bias",
            is_bias=True,
        ),
        ParamSpec(
            "layers.{}.v_bias",
            Role.VALUE,
            (VALUE_OUTPUT,),
            0,
            _layer(
                "self_attn.v_proj.bias",
                f"{QKV}.bias",
                "attn_v.bias",
                "",
                pack=Pack.GROUPED,
                part=2,
                num_parts=3,
            ),
            requires="qkv_bias",
            is_bias=True,
        ),
        ParamSpec(
            "layers.{}.o",
            Role.ATTENTION_OUTPUT,
            (RESIDUAL_OUTPUT, VALUE_INPUT),
            1,
            _layer(
                "self_attn.o_proj.weight",
                "self_attention.linear_proj.weight",
                "attn_output.weight",
                "attention.wo.weight",
            ),
        ),
        ParamSpec(
            "layers.{}.norm2",
            Role.FFN_NORM,
            (RESIDUAL_GAIN,),
            None,
            _layer("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "ffn_norm.weight", "ffn_norm.weight"),
        ),
        ParamSpec(
            "layers.{}.gate",
            Role.FFN_GATE,
            (FFN_OUTPUT, RESIDUAL_INPUT),
            0,
            _layer(
                "mlp.gate_proj.weight",
                "mlp.linear_fc1.weight",
                "ffn_gate.weight",
                "feed_forward.w1.weight",
                pack=Pack.STACKED,
                part=0,
                num_parts=2,
            ),
        ),
        ParamSpec(
            "layers.{}.up",
            Role.FFN_UP,
            (FFN_OUTPUT, RESIDUAL_INPUT),
            0,
            _layer(
                "mlp.up_proj.weight",
                "mlp.linear_fc1.weight",
                "ffn_up.weight",
                "feed_forward.w3.weight",
                pack=Pack.STACKED,
                part=1,
                num_parts=2,
            ),
        ),
        ParamSpec(
            "layers.{}.down",
            Role.FFN_DOWN,
            (RESIDUAL_OUTPUT, FFN_INPUT),
            1,
            _layer("mlp.down_proj.weight", "mlp.linear_fc2.weight", "ffn_down.weight", "feed_forward.w2.weight"),
        ),
        ParamSpec(
            "final_norm",
            Role.FINAL_NORM,
            (RESIDUAL_GAIN,),
            None,
            _slots("model.norm.weight", "decoder.final_layernorm.weight", "output_norm.weight", "norm.weight"),
            feeds_head=True,
        ),
        ParamSpec(
            "head",
            Role.HEAD,
            (VOCAB_OUTPUT, RESIDUAL_INPUT),
            0,
            _slots("lm_head.weight", "output_layer.weight", "output.weight", "output.weight"),
            tied_to="embed",
        ),
    ),
    hf_fields={
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
    },
    required_hf_values={"hidden_act": "silu", "mlp_bias": False, "attention_bias": False, "use_sliding_window": False},
    implied_sizes={
        "llama": {"qkv_bias": False, "sliding_window": None},
        "mistral": {"qkv_bias": False},
        "qwen2": {"qkv_bias": True, "sliding_window": None},
    },
    ignored_names={"hf": ("model.layers.*.self_attn.rotary_emb.inv_freq",)},
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
)

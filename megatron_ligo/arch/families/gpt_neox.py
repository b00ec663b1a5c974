"""GPT-NeoX (Pythia): LayerNorm with bias, a part of each head turned by its position, biases on every linear, an output
head of its own; attention and feed-forward read the residual stream side by side, or (parallel_residual false) in turn.

Hugging Face stores q, k and v as one matrix, head by head, as Megatron-core does.
"""

from collections.abc import Iterator

from megatron_ligo.arch.common_axes import FROM_FFN, FROM_RESIDUAL, FROM_V, TO_FFN, TO_RESIDUAL, VOCAB, K, Q, V
from megatron_ligo.arch.common_params import grouped, linear, norm, under
from megatron_ligo.arch.spec import Architecture, Axis, Row, Slot

HF, MCORE = under("gpt_neox.layers.{}."), under("decoder.layers.{}.")


def _qkv(name: str, axis: Axis, part: int) -> Iterator[Row]:
    slots = HF("attention.query_key_value"), MCORE("self_attention.linear_qkv")
    return linear(f"layers.{{}}.{name}", (axis, FROM_RESIDUAL), 0, *(grouped(slot, part) for slot in slots))


GPT_NEOX = Architecture(
    name="gpt_neox",
    norm="layer",
    model_types={"gpt_neox": {"GPTNeoXForCausalLM": ("has_head",), "GPTNeoXModel": ()}},
    rows=(
        Row(
            "embed",
            (VOCAB, TO_RESIDUAL),
            0,
            {"hf": Slot("gpt_neox.embed_in.weight"), "mcore": Slot("embedding.word_embeddings.weight")},
        ),
        *norm("layers.{}.norm1", HF("input_layernorm"), MCORE("input_layernorm")),
        *_qkv("q", Q, 0),
        *_qkv("k", K, 1),
        *_qkv("v", V, 2),
        *linear("layers.{}.o", (TO_RESIDUAL, FROM_V), 1, HF("attention.dense"), MCORE("self_attention.linear_proj")),
        *norm("layers.{}.norm2", HF("post_attention_layernorm"), MCORE("pre_mlp_layernorm")),
        *linear("layers.{}.up", (TO_FFN, FROM_RESIDUAL), 0, HF("mlp.dense_h_to_4h"), MCORE("mlp.linear_fc1")),
        *linear("layers.{}.down", (TO_RESIDUAL, FROM_FFN), 1, HF("mlp.dense_4h_to_h"), MCORE("mlp.linear_fc2")),
        *norm("final_norm", Slot("gpt_neox.final_layer_norm"), Slot("decoder.final_layernorm"), feeds_head=True),
        Row(
            "head",
            (VOCAB, FROM_RESIDUAL),
            0,
            {"hf": Slot("embed_out.weight"), "mcore": Slot("output_layer.weight")},
            needs="has_head",
            tied_to="embed",
        ),
    ),
    hf={
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_size",
        "num_attention_heads": "num_heads",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_positions",
        "layer_norm_eps": "norm_eps",
        "hidden_act": "activation",
        "tie_word_embeddings": "tied",
        "use_parallel_residual": "parallel_residual",
        "rotary_emb_base": "rope_base",
        "rotary_pct": "rotary_fraction",
        "rope_scaling": "rope_scaling",
    },
    fixed_hf={"attention_bias": True},
    choices={"activation": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")},
    base={"hf": "gpt_neox."},
    ignored={"hf": ("*layers.*.attention.bias", "*layers.*.attention.masked_bias", "*.attention.rotary_emb.inv_freq")},
)

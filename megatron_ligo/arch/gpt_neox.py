"""GPT-NeoX (Pythia): LayerNorm with bias, a part of each head turned by its position, biases on every linear, an output
head of its own; attention and feed-forward read the residual stream side by side, or (parallel_residual false) in turn.

Hugging Face stores q, k and v as one matrix, head by head, as Megatron-core does.
"""

from megatron_ligo.arch.axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    GAIN,
    SHIFT,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    Axis,
    K,
    Q,
    V,
)
from megatron_ligo.arch.rows import Architecture, Pack, Row, Slot

LAYER_HF, LAYER_MCORE = "gpt_neox.layers.{}", "decoder.layers.{}"
QKV = ("attention.query_key_value", "self_attention.linear_qkv")


def _linear(key: str, axes: tuple[Axis, Axis], split: int, names: tuple[str, str], part: int | None = None):
    """A linear's weight and bias. names: Hugging Face's and Megatron-core's, within the layer."""
    packing = () if part is None else (Pack.GROUPED, part, 3)
    hf, mcore = (f"{layer}.{name}" for layer, name in zip((LAYER_HF, LAYER_MCORE), names, strict=True))
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        slots = {"hf": Slot(f"{hf}.{kind}", *packing), "mcore": Slot(f"{mcore}.{kind}", *packing)}
        cut = split if kind == "weight" or split == 0 else None
        yield Row(f"layers.{{}}.{key}{suffix}", axes if kind == "weight" else axes[:1], cut, slots)


def _norm(key: str, hf: str, mcore: str, **more):
    for kind, suffix, axis in (("weight", "", GAIN), ("bias", "_bias", SHIFT)):
        slots = {"hf": Slot(f"{hf}.{kind}"), "mcore": Slot(f"{mcore}.{kind}")}
        yield Row(f"{key}{suffix}", (axis,), None, slots, **more)


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
        *_norm("layers.{}.norm1", f"{LAYER_HF}.input_layernorm", f"{LAYER_MCORE}.input_layernorm"),
        *_linear("q", (Q, FROM_RESIDUAL), 0, QKV, 0),
        *_linear("k", (K, FROM_RESIDUAL), 0, QKV, 1),
        *_linear("v", (V, FROM_RESIDUAL), 0, QKV, 2),
        *_linear("o", (TO_RESIDUAL, FROM_V), 1, ("attention.dense", "self_attention.linear_proj")),
        *_norm("layers.{}.norm2", f"{LAYER_HF}.post_attention_layernorm", f"{LAYER_MCORE}.pre_mlp_layernorm"),
        *_linear("up", (TO_FFN, FROM_RESIDUAL), 0, ("mlp.dense_h_to_4h", "mlp.linear_fc1")),
        *_linear("down", (TO_RESIDUAL, FROM_FFN), 1, ("mlp.dense_4h_to_h", "mlp.linear_fc2")),
        *_norm("final_norm", "gpt_neox.final_layer_norm", "decoder.final_layernorm", feeds_head=True),
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

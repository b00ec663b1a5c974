"""GPT-2: LayerNorm before each block, learned positions, biases on every linear, one stored matrix for q, k and v.

Hugging Face stores its linears as (in, out).
"""

from megatron_ligo.arch.common_axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    GAIN,
    POSITION,
    SHIFT,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    K,
    Q,
    V,
)
from megatron_ligo.arch.spec import Architecture, Pack, Row, Slot


def _top(hf: str, mcore: str) -> dict:
    return {"hf": Slot(hf), "mcore": Slot(mcore)}


def _final_norm(kind: str) -> dict:
    return _top(f"transformer.ln_f.{kind}", f"decoder.final_layernorm.{kind}")


def _layer(hf: str, mcore: str, transposed: bool = False) -> dict:
    return {
        "hf": Slot(f"transformer.h.{{}}.{hf}", transposed=transposed),
        "mcore": Slot(f"decoder.layers.{{}}.{mcore}"),
    }


def _qkv(part: int, kind: str) -> dict:
    hf = Slot(f"transformer.h.{{}}.attn.c_attn.{kind}", Pack.STACKED, part, 3, transposed=kind == "weight")
    return {"hf": hf, "mcore": Slot(f"decoder.layers.{{}}.self_attention.linear_qkv.{kind}", Pack.GROUPED, part, 3)}


O, UP, DOWN = (  # noqa: E741
    ("attn.c_proj", "self_attention.linear_proj"),
    ("mlp.c_fc", "mlp.linear_fc1"),
    ("mlp.c_proj", "mlp.linear_fc2"),
)


def _linear(names: tuple[str, str], kind: str) -> dict:
    return _layer(*(f"{name}.{kind}" for name in names), transposed=kind == "weight")


GPT2 = Architecture(
    name="gpt2",
    norm="layer",
    model_types={"gpt2": {"GPT2LMHeadModel": ("has_head",), "GPT2Model": ()}},
    rows=(
        Row("embed", (VOCAB, TO_RESIDUAL), 0, _top("transformer.wte.weight", "embedding.word_embeddings.weight")),
        Row(
            "positions",
            (POSITION, TO_RESIDUAL),
            None,
            _top("transformer.wpe.weight", "embedding.position_embeddings.weight"),
        ),
        Row("layers.{}.norm1", (GAIN,), None, _layer("ln_1.weight", "input_layernorm.weight")),
        Row("layers.{}.norm1_bias", (SHIFT,), None, _layer("ln_1.bias", "input_layernorm.bias")),
        Row("layers.{}.q", (Q, FROM_RESIDUAL), 0, _qkv(0, "weight")),
        Row("layers.{}.k", (K, FROM_RESIDUAL), 0, _qkv(1, "weight")),
        Row("layers.{}.v", (V, FROM_RESIDUAL), 0, _qkv(2, "weight")),
        Row("layers.{}.q_bias", (Q,), 0, _qkv(0, "bias")),
        Row("layers.{}.k_bias", (K,), 0, _qkv(1, "bias")),
        Row("layers.{}.v_bias", (V,), 0, _qkv(2, "bias")),
        Row("layers.{}.o", (TO_RESIDUAL, FROM_V), 1, _linear(O, "weight")),
        Row("layers.{}.o_bias", (TO_RESIDUAL,), None, _linear(O, "bias")),
        Row("layers.{}.norm2", (GAIN,), None, _layer("ln_2.weight", "pre_mlp_layernorm.weight")),
        Row("layers.{}.norm2_bias", (SHIFT,), None, _layer("ln_2.bias", "pre_mlp_layernorm.bias")),
        Row("layers.{}.up", (TO_FFN, FROM_RESIDUAL), 0, _linear(UP, "weight")),
        Row("layers.{}.up_bias", (TO_FFN,), 0, _linear(UP, "bias")),
        Row("layers.{}.down", (TO_RESIDUAL, FROM_FFN), 1, _linear(DOWN, "weight")),
        Row("layers.{}.down_bias", (TO_RESIDUAL,), None, _linear(DOWN, "bias")),
        Row("final_norm", (GAIN,), None, _final_norm("weight"), feeds_head=True),
        Row("final_norm_bias", (SHIFT,), None, _final_norm("bias"), feeds_head=True),
        Row(
            "head",
            (VOCAB, FROM_RESIDUAL),
            0,
            _top("lm_head.weight", "output_layer.weight"),
            needs="has_head",
            tied_to="embed",
        ),
    ),
    hf={
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_inner": "ffn_size",
        "n_head": "num_heads",
        "vocab_size": "vocab_size",
        "n_positions": "max_positions",
        "layer_norm_epsilon": "norm_eps",
        "activation_function": "activation",
        "tie_word_embeddings": "tied",
    },
    fixed_hf={
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    choices={"activation": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")},
    base={"hf": "transformer."},
    ignored={"hf": ("*h.*.attn.bias", "*h.*.attn.masked_bias")},
)

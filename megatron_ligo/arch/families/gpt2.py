"""GPT-2: LayerNorm before each block, learned positions, biases on every linear, one stored matrix for q, k and v.

Hugging Face stores its linears as (in, out).
"""

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    KEY_OUTPUT,
    POSITION_OUTPUT,
    QUERY_OUTPUT,
    RESIDUAL_BIAS,
    RESIDUAL_GAIN,
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    VALUE_INPUT,
    VALUE_OUTPUT,
    VOCAB_OUTPUT,
)
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role


def _top(hf: str, mcore: str) -> dict:
    return {"hf": FormatLocation(hf), "mcore": FormatLocation(mcore)}


def _final_norm(kind: str) -> dict:
    return _top(f"transformer.ln_f.{kind}", f"decoder.final_layernorm.{kind}")


def _layer(hf: str, mcore: str, transposed: bool = False) -> dict:
    return {
        "hf": FormatLocation(f"transformer.h.{{}}.{hf}", transposed=transposed),
        "mcore": FormatLocation(f"decoder.layers.{{}}.{mcore}"),
    }


def _qkv(part: int, kind: str) -> dict:
    hf = FormatLocation(f"transformer.h.{{}}.attn.c_attn.{kind}", Pack.STACKED, part, 3, transposed=kind == "weight")
    return {
        "hf": hf,
        "mcore": FormatLocation(f"decoder.layers.{{}}.self_attention.linear_qkv.{kind}", Pack.GROUPED, part, 3),
    }


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
    params=(
        ParamSpec(
            "embed",
            Role.WORD_EMBEDDING,
            (VOCAB_OUTPUT, RESIDUAL_OUTPUT),
            0,
            _top("transformer.wte.weight", "embedding.word_embeddings.weight"),
        ),
        ParamSpec(
            "positions",
            Role.POSITION_EMBEDDING,
            (POSITION_OUTPUT, RESIDUAL_OUTPUT),
            None,
            _top("transformer.wpe.weight", "embedding.position_embeddings.weight"),
        ),
        ParamSpec(
            "layers.{}.norm1",
            Role.ATTENTION_NORM,
            (RESIDUAL_GAIN,),
            None,
            _layer("ln_1.weight", "input_layernorm.weight"),
        ),
        ParamSpec(
            "layers.{}.norm1_bias",
            Role.ATTENTION_NORM,
            (RESIDUAL_BIAS,),
            None,
            _layer("ln_1.bias", "input_layernorm.bias"),
            is_bias=True,
        ),
        ParamSpec("layers.{}.q", Role.QUERY, (QUERY_OUTPUT, RESIDUAL_INPUT), 0, _qkv(0, "weight")),
        ParamSpec("layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, _qkv(1, "weight")),
        ParamSpec("layers.{}.v", Role.VALUE, (VALUE_OUTPUT, RESIDUAL_INPUT), 0, _qkv(2, "weight")),
        ParamSpec("layers.{}.q_bias", Role.QUERY, (QUERY_OUTPUT,), 0, _qkv(0, "bias"), is_bias=True),
        ParamSpec("layers.{}.k_bias", Role.KEY, (KEY_OUTPUT,), 0, _qkv(1, "bias"), is_bias=True),
        ParamSpec("layers.{}.v_bias", Role.VALUE, (VALUE_OUTPUT,), 0, _qkv(2, "bias"), is_bias=True),
        ParamSpec("layers.{}.o", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT, VALUE_INPUT), 1, _linear(O, "weight")),
        ParamSpec(
            "layers.{}.o_bias", Role.ATTENTION_OUTPUT, (RESIDUAL_OUTPUT,), None, _linear(O, "bias"), is_bias=True
        ),
        ParamSpec(
            "layers.{}.norm2", Role.FFN_NORM, (RESIDUAL_GAIN,), None, _layer("ln_2.weight", "pre_mlp_layernorm.weight")
        ),
        ParamSpec(
            "layers.{}.norm2_bias",
            Role.FFN_NORM,
            (RESIDUAL_BIAS,),
            None,
            _layer("ln_2.bias", "pre_mlp_layernorm.bias"),
            is_bias=True,
        ),
        ParamSpec("layers.{}.up", Role.FFN_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, _linear(UP, "weight")),
        ParamSpec("layers.{}.up_bias", Role.FFN_UP, (FFN_OUTPUT,), 0, _linear(UP, "bias"), is_bias=True),
        ParamSpec("layers.{}.down", Role.FFN_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, _linear(DOWN, "weight")),
        ParamSpec("layers.{}.down_bias", Role.FFN_DOWN, (RESIDUAL_OUTPUT,), None, _linear(DOWN, "bias"), is_bias=True),
        ParamSpec("final_norm", Role.FINAL_NORM, (RESIDUAL_GAIN,), None, _final_norm("weight"), feeds_head=True),
        ParamSpec(
            "final_norm_bias",
            Role.FINAL_NORM,
            (RESIDUAL_BIAS,),
            None,
            _final_norm("bias"),
            feeds_head=True,
            is_bias=True,
        ),
        ParamSpec(
            "head",
            Role.HEAD,
            (VOCAB_OUTPUT, RESIDUAL_INPUT),
            0,
            _top("lm_head.weight", "output_layer.weight"),
            requires="has_head",
            tied_to="embed",
        ),
    ),
    hf_fields={
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
    required_hf_values={
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
    },
    choices={"activation": ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu")},
    base_prefixes={"hf": "transformer."},
    ignored_names={"hf": ("*h.*.attn.bias", "*h.*.attn.masked_bias")},
)

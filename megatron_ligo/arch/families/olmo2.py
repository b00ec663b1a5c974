"""OLMo 2: norms after the blocks instead of before them, and over all query heads and all key heads together.

After a block: what it returns is E y for the small y, its root mean square is f times the small one's, and the gain
takes f, as before a block: E times the small output. A new layer's gains are zero, so that it writes nothing. Over all
heads: copies of a head are divided by the root of their number, so that the root mean square is again f (of the heads)
times the small one's; the gain makes each copy a whole head. Values are divided by it too, and `o` reads them so. One
eps serves all norms, so both maps are scaled to f = 1, as in Qwen3.
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import ALL_KEYS_GAIN, ALL_QUERIES_GAIN, RESIDUAL_GAIN
from megatron_ligo.arch.common_params import Locations, locations_below, weight_of, without_format
from megatron_ligo.arch.families.llama import (
    ATTENTION_BIAS,
    ATTENTION_BIASES,
    LLAMA,
    OUTPUT_FOLLOWS,
    PLAIN_FIELDS,
    params_with,
)
from megatron_ligo.arch.spec import ParamSpec, Role


def layer_gain(hf: str, mcore: str, gguf: str = "") -> Locations:
    """Returns the locations of a norm's gain in a layer."""
    return weight_of(locations_below("model.layers.{}.", "decoder.layers.{}.", "blk.{}.")(hf, mcore, gguf))


QUERY_NORM = layer_gain("self_attn.q_norm", "self_attention.q_layernorm", "attn_q_norm")
KEY_NORM = layer_gain("self_attn.k_norm", "self_attention.k_layernorm", "attn_k_norm")
ATTENTION_OUTPUT_NORM = layer_gain("post_attention_layernorm", "post_self_attn_layernorm", "post_attention_norm")
FFN_OUTPUT_NORM = layer_gain("post_feedforward_layernorm", "post_mlp_layernorm", "post_ffw_norm")
INPUT_NORMS = (Role.ATTENTION_NORM, Role.FFN_NORM)
BLOCK_OUTPUTS = (Role.ATTENTION_OUTPUT, Role.FFN_DOWN)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types={"olmo2": {"Olmo2ForCausalLM": ()}},
    params=(
        *(
            replace(param, feeds_output_norm=param.role in BLOCK_OUTPUTS)
            for param in without_format(params_with(*ATTENTION_BIASES), "fairscale")
            if param.role not in INPUT_NORMS
        ),
        ParamSpec("layers.{}.q_norm", Role.QUERY_NORM, (ALL_QUERIES_GAIN,), 0, QUERY_NORM),
        ParamSpec("layers.{}.k_norm", Role.KEY_NORM, (ALL_KEYS_GAIN,), 0, KEY_NORM),
        ParamSpec("layers.{}.norm1", Role.ATTENTION_OUTPUT_NORM, (RESIDUAL_GAIN,), None, ATTENTION_OUTPUT_NORM),
        ParamSpec("layers.{}.norm2", Role.FFN_OUTPUT_NORM, (RESIDUAL_GAIN,), None, FFN_OUTPUT_NORM),
    ),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key != "sliding_window"} | ATTENTION_BIAS,
    coupled_fields={"olmo2": OUTPUT_FOLLOWS},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    # transformers reads it without a declaration.
    hf_fixed=LLAMA.hf_fixed | {"sliding_window": (None,)},
    hf_pattern_keys={},
    implied_sizes={},
)

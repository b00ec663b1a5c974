"""GLM-4 (0414): norms before and after each block, rotary pairs as neighbours on a part of each head, and gate and up
as one matrix. Query, key and value may have biases.

Growth copies whole heads with their pairs. A block's norm takes f = sqrt(D1 / D2), as in OLMo 2, so that any ratio is
lossless; eps x D1 / D2 is right for all norms.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_axes import RESIDUAL_GAIN
from megatron_ligo.arch.common_params import CAUSAL
from megatron_ligo.arch.families.llama import ATTENTION_BIAS, LLAMA, PLAIN_FIELDS, params_with
from megatron_ligo.arch.families.olmo2 import BLOCK_OUTPUTS, layer_gain
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

ROTATED = (Role.QUERY, Role.KEY)
GATE_UP = (Role.FFN_GATE, Role.FFN_UP)
# Megatron-core's layers have them under the same names.
OUTPUT_NORMS = {
    Role.ATTENTION_OUTPUT_NORM: ("layers.{}.norm1_out", "post_self_attn_layernorm", "post_attention_norm"),
    Role.FFN_OUTPUT_NORM: ("layers.{}.norm2_out", "post_mlp_layernorm", "post_ffw_norm"),
}


def _params() -> Iterator[ParamSpec]:
    for param in params_with("qkv_bias"):
        locations = {name: param.locations[name] for name in ("hf", "mcore", "gguf")}
        for name in ("hf", "gguf"):
            locations[name] = replace(locations[name], interleaved=param.role in ROTATED)
        if param.role in GATE_UP:
            part = GATE_UP.index(param.role)
            locations["hf"] = FormatLocation("model.layers.{}.mlp.gate_up_proj.weight", Pack.STACKED, part, 2)
            locations["gguf"] = FormatLocation("blk.{}.ffn_up.weight", Pack.STACKED, part, 2)
        yield replace(param, locations=locations, feeds_output_norm=param.role in BLOCK_OUTPUTS)
    for role, (key, name, gguf) in OUTPUT_NORMS.items():
        yield ParamSpec(key, role, (RESIDUAL_GAIN,), None, layer_gain(name, name, gguf))


GLM4 = replace(
    LLAMA,
    name="glm4",
    own_head_dim=True,
    model_types={"glm4": {"Glm4ForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key != "sliding_window"}
    | ATTENTION_BIAS
    | {"partial_rotary_factor": "rotary_fraction"},
    coupled_fields={},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    expert_types={},
    hf_fixed=CAUSAL | {"sliding_window": (None,), "mlp_bias": (False, None), "use_bias": ()},
)

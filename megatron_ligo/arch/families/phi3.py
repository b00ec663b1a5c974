"""Phi-3, and Phi-4-mini, which rotates a part of each head: Llama whose files hold q, k, v and gate, up as one matrix.

The matrices are stacked along their outputs, so each part grows by its own map. Rotated features keep their pairs as
long as the head size does (growth/attention_heads.py refuses another one beside a part that does not rotate).
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import CAUSAL, weight_of
from megatron_ligo.arch.families.llama import LLAMA, PLAIN_FIELDS, params_with
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

QKV = {"hf": "model.layers.{}.self_attn.qkv_proj", "gguf": "blk.{}.attn_qkv"}
GATE_UP = {"hf": "model.layers.{}.mlp.gate_up_proj", "gguf": "blk.{}.ffn_up"}
# Role: the fused matrix, the part in it, and the number of its parts.
FUSED = {
    Role.QUERY: (QKV, 0, 3),
    Role.KEY: (QKV, 1, 3),
    Role.VALUE: (QKV, 2, 3),
    Role.FFN_GATE: (GATE_UP, 0, 2),
    Role.FFN_UP: (GATE_UP, 1, 2),
}
# The released models name their own code of the same network.
OWN_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
DROPPED = ("head_dim", "rope_scaling")


def _params() -> Iterator[ParamSpec]:
    for param in params_with():
        locations = {name: param.locations[name] for name in ("hf", "mcore", "gguf")}
        if param.role in FUSED:
            names, part, num_parts = FUSED[param.role]
            fused = {name: FormatLocation(tensor, Pack.STACKED, part, num_parts) for name, tensor in names.items()}
            locations |= weight_of(fused)
        yield replace(param, locations=locations)


PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types={"phi3": {"Phi3ForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={
        **{key: name for key, name in PLAIN_FIELDS.items() if key not in DROPPED},
        "partial_rotary_factor": "rotary_fraction",
        "rope_scaling": "rope_scaling",
    },
    gguf_fields={key: name for key, name in LLAMA.gguf_fields.items() if name != "head_dim"}
    | {"attention.sliding_window": "sliding_window"},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    # Its class reads the older names of longrope, and no other scaling.
    rope_kinds={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
    original_length=4096,
    hf_fixed=CAUSAL
    | {
        "attention_bias": (False, None),
        "use_bias": (),
        **dict.fromkeys(("full_attn_mod", "interpolate_factor"), (1, None)),
        "auto_map": (None, OWN_CODE, {**OWN_CODE, "AutoTokenizer": "Xenova/gpt-4o"}),
    },
)

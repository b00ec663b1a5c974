"""Phi-3, and Phi-4-mini, which rotates a part of each head: Llama whose files hold q, k, v and gate, up as one matrix.

The matrices are stacked along their outputs, so each part grows by its own map. Rotated features keep their pairs as
long as the head size does (growth/attention_heads.py refuses another one beside a part that does not rotate).
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import CAUSAL, weight_of
from megatron_ligo.arch.families.llama import LLAMA
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

QKV, GATE_UP = "model.layers.{}.self_attn.qkv_proj", "model.layers.{}.mlp.gate_up_proj"
FUSED = {
    Role.QUERY: FormatLocation(QKV, Pack.STACKED, 0, num_parts=3),
    Role.KEY: FormatLocation(QKV, Pack.STACKED, 1, num_parts=3),
    Role.VALUE: FormatLocation(QKV, Pack.STACKED, 2, num_parts=3),
    Role.FFN_GATE: FormatLocation(GATE_UP, Pack.STACKED, 0, num_parts=2),
    Role.FFN_UP: FormatLocation(GATE_UP, Pack.STACKED, 1, num_parts=2),
}
# The released models name their own code of the same network.
OWN_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
DROPPED = ("head_dim", "rope_scaling")


def _params() -> Iterator[ParamSpec]:
    for param in LLAMA.params:
        if param.requires:
            continue
        locations = {name: param.locations[name] for name in ("hf", "mcore")}
        fused = FUSED.get(param.role)
        yield replace(param, locations=locations | (weight_of({"hf": fused}) if fused else {}))


PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types={"phi3": {"Phi3ForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={
        **{key: name for key, name in LLAMA.hf_fields.items() if key not in DROPPED},
        "partial_rotary_factor": "rotary_fraction",
        "rope_scaling": "rope_scaling",
    },
    gguf_fields={},
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

"""Granite with windows: Granite 3 with sinks of the query heads, and layers with a window or no rotary positions.

A sink is a learned logit in its head's softmax. Growth copies it with its head, so that scores and sinks are those of
the small model at any ratio; the factors are Granite's. Its config states a rotary base for each layer, of which all
must be one, or 0 for none.
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import SINK_OUTPUT
from megatron_ligo.arch.common_params import locations, without_format
from megatron_ligo.arch.families.granite import GRANITE, MULTIPLIERS
from megatron_ligo.arch.families.llama import LLAMA, OUTPUT_FOLLOWS
from megatron_ligo.arch.spec import ParamSpec, Role

SINKS = ParamSpec(
    "layers.{}.sinks",
    Role.ATTENTION_SINK,
    (SINK_OUTPUT,),
    0,
    locations("model.layers.{}.self_attn.sinks", "decoder.layers.{}.self_attention.core_attention.softmax_offset"),
)

GRANITE_SWA = replace(
    GRANITE,
    name="granite_swa",
    model_types={"granite_swa": {"GraniteSWAForCausalLM": ()}},
    params=(*without_format(without_format(GRANITE.params, "gguf"), "torchtitan"), SINKS),
    hf_fields=LLAMA.hf_fields | MULTIPLIERS,
    gguf_fields={},
    coupled_fields={"granite_swa": OUTPUT_FOLLOWS},
    hf_fixed=LLAMA.hf_fixed,
    hf_pattern_keys={"granite_swa": ("layer_types", "layer_rope_theta")},
)

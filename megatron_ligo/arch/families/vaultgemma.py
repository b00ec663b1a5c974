"""VaultGemma: Gemma 2 without the norms after its blocks.

Growth is Gemma 2's, of which nothing is left of the output norms: what a block writes grows like the stream.
"""

from dataclasses import replace

from megatron_ligo.arch.families.gemma2 import GEMMA2
from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.spec import OUTPUT_NORMS

VAULTGEMMA = replace(
    GEMMA2,
    name="vaultgemma",
    model_types={"vaultgemma": {"VaultGemmaForCausalLM": ()}},
    params=tuple(replace(param, feeds_output_norm=False) for param in GEMMA2.params if param.role not in OUTPUT_NORMS),
    coupled_fields={"vaultgemma": OUTPUT_FOLLOWS},
    gguf_fields={},
    hf_pattern_keys={"vaultgemma": ("layer_types",)},
)

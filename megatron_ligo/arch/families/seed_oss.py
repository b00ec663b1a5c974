"""Seed-OSS: Llama whose output projection has a bias by a key of its own, and whose config states the head size.

Growth is Llama's, at any ratio: a bias of the residual stream grows as what writes it.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import DROPOUT, without_format
from megatron_ligo.arch.families.llama import LLAMA
from megatron_ligo.arch.spec import FormatLocation, ParamSpec, Role


def _params() -> Iterator[ParamSpec]:
    for param in without_format(without_format(LLAMA.params, "fairscale"), "torchtitan"):
        if param.role is Role.FFN_NORM:
            gguf = FormatLocation("blk.{}.post_attention_norm.weight")
            param = replace(param, locations=param.locations | {"gguf": gguf})
        yield param


SEED_OSS = replace(
    LLAMA,
    name="seed_oss",
    own_head_dim=True,
    model_types={"seed_oss": {"SeedOssForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in LLAMA.hf_fields.items() if key != "sliding_window"}
    | {"attention_out_bias": "output_bias"},
    coupled_fields={},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    expert_types={},
    hf_fixed=LLAMA.hf_fixed | {"sliding_window": (None,)},
    hf_harmless=LLAMA.hf_harmless | {"residual_dropout": DROPOUT},
)

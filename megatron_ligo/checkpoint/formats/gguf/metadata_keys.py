"""The allow-list of GGUF metadata: what each key means for the networks that this program reads.

llama.cpp prefixes a network's keys with its name (`llama.block_count`); the tables here hold them without it.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, KeyTable
from megatron_ligo.common.errors import ErrorCollector

DESCRIPTION = "it describes the file; no program computes from it"
# Namespaces whose keys are all of one kind, also those of later versions.
HARMLESS_NAMESPACES = {
    "general.": DESCRIPTION,
    "mradermacher.": DESCRIPTION,
    "quantize.": "it states how the file was quantised; each tensor states its own type",
    "imatrix.": "statistics for quantisation",
    "tokenizer.": "tokenizer_keys.py classifies it; a tokenizer that is not understood is left out",
    "split.": "split_files.py reads the parts of a model",
}
ROPE = "rope_scaling"
# Read by rope_metadata.py.
ROPE_FIELDS = (
    "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_log_multiplier",
)  # fmt: skip
# Must be what follows from the head size; 0 means that.
ATTENTION_SCALE = "attention.scale"
# Must be the head size; a family may rotate a part of it.
ROTATED = "rope.dimension_count"
HEAD_SIZES = (ROTATED, "attention.value_length", "attention.key_length")
WINDOW, WINDOW_PATTERN, WINDOW_BASE = (
    "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
)  # fmt: skip
EXPERT_COUNT = "expert_count"
OF_WINDOWS = (
    WINDOW_BASE, WINDOW_PATTERN, "rope.dimension_count_swa", "attention.key_length_swa", "attention.value_length_swa",
)  # fmt: skip
HARMLESS = {
    "feed_forward_length": "of dense blocks; these networks have experts in every layer",
    "rope.scaling.finetuned": "it states whether the model was trained with the scaling that it states",
    **dict.fromkeys(OF_WINDOWS, "of layers with a sliding window, which attention.sliding_window would state"),
    "attention.layer_norm_epsilon": "of LayerNorm; these networks have RMSNorm",
    "attention.layer_norm_rms_epsilon": "of RMSNorm; these networks have LayerNorm",
    "attention.group_norm_epsilon": "of GroupNorm; these networks have RMSNorm",
    "attention.group_norm_groups": "of GroupNorm; these networks have RMSNorm",
    "pooling_type": "it chooses what an embedding server returns",
    "decoder_start_token_id": "the first token of generation by encoder-decoder models",
    "classifier.output_labels": "names of a classifier's labels; its tensors would be refused",
}
# The values under which a key switches nothing on.
OFF = (0, False, "", ())
OFF_KEYS = (
    EXPERT_COUNT, "expert_used_count", "expert_shared_count", "expert_group_count", "expert_group_used_count",
    "expert_weights_scale", "expert_weights_norm", "expert_gating_func", "expert_group_scale", "experts_per_group",
    "expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_chunk_feed_forward_length",
    "moe_every_n_layers", "moe_latent_size", "interleave_moe_layer_step", "leading_dense_block_count",
    "nextn_predict_layers", "n_deepstack_layers", "attn_logit_softcapping", "router_logit_softcapping",
    "final_logit_softcapping", "swin_norm", "use_parallel_residual", "rescale_every_n_layers", "time_mix_extra_dim",
    "time_decay_extra_dim", "token_shift_count", "full_attention_interval", "activation_sparsity_scale",
    "altup.active_idx", "altup.num_inputs", "embedding_length_per_layer_input", "embedding_length_out",
    "features_length", "decoder_block_count", "swiglu_clamp_exp", "swiglu_clamp_shexp", "dense_2_feat_in",
    "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out",
    "attention.max_alibi_bias", "attention.clamp_kqv", WINDOW,
    "attention.q_lora_rank", "attention.kv_lora_rank", "attention.decay_lora_rank", "attention.iclr_lora_rank",
    "attention.value_residual_mix_lora_rank", "attention.gate_lora_rank", "attention.relative_buckets_count",
    "attention.temperature_length", "attention.key_length_mla", "attention.value_length_mla",
    "attention.shared_kv_layers", "attention.indexer.head_count", "attention.indexer.key_length",
    "attention.indexer.top_k",
    "rope.dimension_sections", "rope.scaling.alpha",
    "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count", "ssm.dt_b_c_rms",
    "kda.head_dim", "wkv.head_size", "posnet.embedding_length", "posnet.block_count", "convnext.embedding_length",
    "convnext.block_count", "shortconv.l_cache",
)  # fmt: skip
# Factors, which 1 leaves alone; llama.cpp takes 0 as "none".
FACTOR_KEYS = (
    "logit_scale", "residual_scale", "embedding_scale", "attention.output_scale", "attention.temperature_scale",
)  # fmt: skip
FIXED = {
    **dict.fromkeys(OFF_KEYS, OFF),
    **dict.fromkeys(FACTOR_KEYS, (0, 1)),
    "attention.causal": (True,),
    # llama.cpp's first converter wrote it.
    "tensor_data_layout": ("Meta AI original pth",),
}
# Of the file, without a network's name. Files of other kinds than a model's weights bear the other namespaces.
# llama.cpp rotates Granite's queries and keys only where this is true.
OWN_FIXED = {
    "granite": {"rope.scaling.finetuned": (True,)},
    # By whom its converter was written.
    "falcon": {"tensor_data_layout": ("jploski",)},
}
FILE_FIELDS = {"general.architecture": "model_type", "general.alignment": "alignment"}
FILE_FIXED = {
    "general.type": ("model",),
    # Version 1 stored other blocks under the same types.
    "general.quantization_version": (2,),
}
FOREIGN_NAMESPACES = ("adapter.", "clip.", "diffusion.", "xielu.", "controlvector.", "training.", "optimizer.")


def key_table(arch: Architecture, family: str) -> KeyTable:
    """Returns the classification of the keys of one network, `family` by its name in GGUF."""
    fields = {**dict.fromkeys(HEAD_SIZES, "head_dim"), **arch.gguf_fields}
    if arch.gguf_network.window_period:
        fields |= {WINDOW_PATTERN: "window_layers", WINDOW_BASE: "window_rope_base"}
    fields.setdefault(ATTENTION_SCALE, "head_dim")
    fields |= dict.fromkeys(ROPE_FIELDS, ROPE)
    fixed = FIXED | OWN_FIXED.get(family, {})
    if WINDOW in fields:
        fixed |= {key: () for key in OF_WINDOWS if key not in fields}
    return KeyTable(
        {f"{family}.{key}": name for key, name in fields.items()} | FILE_FIELDS,
        {f"{family}.{key}": reason for key, reason in HARMLESS.items() if key not in fields | fixed},
        {f"{family}.{key}": values for key, values in fixed.items() if key not in fields} | FILE_FIXED,
    )


def classify(key: str, arch: Architecture, family: str) -> str:
    """Returns "field", "harmless", "fixed" or "foreign" (refused unless empty); "" for a key that nobody knows."""
    table = key_table(arch, family)
    for kind, keys in (("field", table.fields), ("fixed", table.fixed), ("harmless", table.harmless)):
        if key in keys:
            return kind
    if key.startswith(tuple(HARMLESS_NAMESPACES)):
        return "harmless"
    return "foreign" if key.startswith(FOREIGN_NAMESPACES) else ""


def check_keys(
    metadata: Mapping[str, object], arch: Architecture, family: str, accepted: AcceptedKeys, errors: ErrorCollector
) -> None:
    """Adds an error for every key of a file that may change the model in a way that this program does not know."""
    table = key_table(arch, family)
    stated = {
        key: value for key, value in metadata.items() if key in table or not key.startswith(tuple(HARMLESS_NAMESPACES))
    }
    table.check(stated, accepted, errors)

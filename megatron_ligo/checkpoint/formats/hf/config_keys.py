"""What each key of a config.json means, by `model_type`: an allow-list.

The keys of transformers' common base class are here, those of a family in its file (arch/families). A key that is in
neither passes only while its value is empty (source_keys.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cache

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.rope_parameters import ROPE_KEYS
from megatron_ligo.checkpoint.source_keys import KeyTable


def _because(reason: str, names: str) -> dict[str, str]:
    """Returns {name: reason} for names separated by spaces."""
    return dict.fromkeys(names.split(), reason)


HARMLESS = {
    **_because(
        "the token ids and the tokenizer of the vocabulary; the network computes the same for any",
        "bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id "
        "decoder_start_token_id tokenizer_class prefix",
    ),
    **_because(
        "how text is generated from the logits",
        "max_length min_length max_new_tokens min_new_tokens max_time stop_strings do_sample early_stopping num_beams "
        "num_beam_groups diversity_penalty temperature top_k top_p top_h min_p typical_p epsilon_cutoff eta_cutoff "
        "repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids force_words_ids constraints renormalize_logits "
        "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty "
        "suppress_tokens begin_suppress_tokens sequence_bias token_healing guidance_scale watermarking_config "
        "num_return_sequences output_scores output_logits return_dict_in_generate penalty_alpha dola_layers "
        "low_memory cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile "
        "prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule "
        "assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind "
        "assistant_ngram_num_centroids assistant_ensemble_weight speculation_type is_assistant use_mtp "
        "continuous_batching_config",
    ),
    **_because(
        "what a call returns beside the logits, and in which container",
        "output_hidden_states output_attentions output_past output_cross_attentions return_dict use_return_dict "
        "torchscript use_cache tie_last_hidden_states",
    ),
    **_because(
        "which kernel computes the same function",
        "attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal "
        "_flash_attn_2_enabled experts_implementation _experts_implementation _experts_implementation_internal "
        "chunk_size_feed_forward xla_device",
    ),
    **_because("each tensor keeps the dtype that it is stored in", "dtype torch_dtype use_bfloat16"),
    **_because(
        "how weights are drawn before training, or what training costs",
        "initializer_range initializer_factor init_std gradient_checkpointing",
    ),
    **_because(
        "a record of where the model comes from and what it is used for",
        "transformers_version _name_or_path name_or_path _commit_hash _from_model_config _diffusers_version "
        "finetuning_task task_specific_params problem_type id2label label2id num_labels _num_labels custom_pipelines "
        "unsloth_version unsloth_fixed transformers.js_config",
    ),
}

# Keys that change the network if they have any other value.
FIXED: dict[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
    "attention_chunk_size": (None,),
    "kv_sharing_modes": (None,),
    "transformers_weights": (None,),
    "fusion_config": (None,),
    "quantization_config": (None,),
    "quantization": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
}
HINTS = {
    **_because("Dequantise the weights first.", "quantization_config quantization compression_config"),
    "auto_map": "The model brings its own code, which may compute something else.",
    "per_layer_config": "Layers of different sizes are not supported.",
    "transformers_weights": "Rename that file to model.safetensors.",
}
# The names of labels by number: of images without num_labels, they are counted.
LABELS = "id2label"
# The fields of ModelConfig that are true or false.
SWITCHES = tuple(field.name for field in dataclasses.fields(ModelConfig) if field.type == "bool")
# Read by config_json.py itself.
READ = ("model_type", "architectures", "layer_types", "head_dim")


@cache
def key_table(model_type: str) -> KeyTable:
    """Returns the table of one `model_type`. KeyError if no family reads it."""
    (arch,) = (arch for arch in architectures.architectures().values() if model_type in arch.model_types)
    foreign = arch.foreign_hf_keys.get(model_type, ())
    fields = {key: name for key, name in arch.hf_fields.items() if key not in foreign}
    fields |= {key: arch.hf_fields[name] for key, name in arch.hf_aliases.items()}
    fields |= {key: key for key in READ if key not in fields}
    fields |= {LABELS: "vocab_size"} if arch.reads_images else {}
    fields |= {arch.ffn_ratio_key: "ffn_size"} if arch.ffn_ratio_key else {}
    fields |= {key: "layers" for key in arch.hf_pattern_keys.get(model_type, ()) if key not in fields}
    fields |= {key: "rope" for key in _rope_keys(arch) if key not in fields}
    # A key of the family that this type's class does not know must not say anything.
    fixed: dict[str, tuple[object, ...]] = {
        key: (None, False) if arch.hf_fields[key] in SWITCHES else (None,) for key in foreign if key in arch.hf_fields
    }
    fixed |= {key: (value, None) if key in foreign else (value,) for key, value in arch.required_hf_values.items()}
    fixed = {**FIXED, **arch.hf_fixed, **fixed}
    harmless = {**HARMLESS, **arch.hf_harmless}
    return KeyTable(
        fields=fields,
        fixed=_without(fixed, fields),
        harmless=_without(harmless, [*fields, *fixed]),
        hints=HINTS,
    )


def _rope_keys(arch: Architecture) -> Iterable[str]:
    return ROPE_KEYS if arch.has_rotary_positions else ()


def _without(mapping: Mapping[str, object], names: Iterable[str]) -> dict:
    """Returns a mapping without some of its keys: a family's meaning of a key replaces the common one."""
    names = set(names)
    return {key: value for key, value in mapping.items() if key not in names}

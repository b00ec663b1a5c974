"""What each of Megatron-LM's run arguments says about a model.

The same names, or those of Megatron-core's TransformerConfig and GPTModel, describe the model in Megatron-DeepSpeed's
checkpoints and in Megatron-Bridge's run_config.yaml.
"""

from __future__ import annotations

from megatron_ligo.checkpoint.formats.megatron_lm.harmless_arguments import HARMLESS
from megatron_ligo.checkpoint.formats.megatron_lm.rope_arguments import YARN_ARGS
from megatron_ligo.checkpoint.source_keys import KeyTable

OFF = (False, None)
NONE = (None,)

# Name -> field of ModelConfig, or "family": what Megatron's layers are made of (argument_parsing.py).
FIELDS = {
    "num_layers": "num_layers",
    "encoder_num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_kv_heads",
    "group_query_attention": "num_kv_heads",
    "num_key_value_heads": "num_kv_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "padded_vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "max_sequence_length": "max_positions",
    "norm_epsilon": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "untie_embeddings_and_output_weights": "tied",
    "share_embeddings_and_output_weights": "tied",
    "add_qkv_bias": "qkv_bias",
    "window_size": "sliding_window",
    "window_attn_skip_freq": "window_layers",
    "no_rope_freq": "rope_layers",
    "position_embedding_type": "family",
    "use_rotary_position_embeddings": "family",
    "rotary_base": "rope_base",
    "rope_theta": "rope_base",
    "rope_scaling": "rope_scaling",
    "use_rope_scaling": "rope_scaling",
    "rope_scaling_factor": "rope_scaling",
    "rotary_seq_len_interpolation_factor": "rope_scaling",
    "seq_len_interpolation_factor": "rope_scaling",
    **dict.fromkeys(YARN_ARGS, "rope_scaling"),
    "rotary_percent": "rotary_fraction",
    "normalization": "family",
    "qk_layernorm": "family",
    "swiglu": "family",
    "gated_linear_unit": "family",
    "activation_func": "family",
    "add_bias_linear": "family",
    "moe_router_topk": "top_k",
    "num_experts": "num_experts",
    "num_moe_experts": "num_experts",
    "openai_gelu": "activation",
    "bias_gelu_fusion": "activation",
    "use_te_activation_func": "activation",
    "bias_activation_fusion": "activation",
}

# The functions of Megatron-Bridge and NeMo that choose between Transformer Engine's layers and local ones.
LAYER_SPECS = tuple(
    f"{module}.{name}"
    for module in (
        "megatron.bridge.models.gpt_provider",
        "megatron.bridge.models.gpt.gpt_builder",
        "nemo.collections.llm.gpt.model.base",
    )
    for name in (
        "default_layer_spec",
        "local_layer_spec",
        "transformer_engine_full_layer_spec",
        "transformer_engine_layer_spec",
    )
)

FIXED: dict[str, tuple[object, ...]] = {
    # Positions.
    "rotary_interleaved": OFF,
    "rope_type": (None, "rope"),
    "mrope_section": NONE,
    # Attention.
    "softmax_type": ("vanilla", None),
    "softmax_scale": NONE,
    "attention_output_gate": OFF,
    "qk_l2_norm": OFF,
    "multi_latent_attention": OFF,
    "experimental_attention_variant": NONE,
    "linear_attention_freq": NONE,
    "use_arbitrary_attention_mask": OFF,
    # Feed-forward.
    "activation_func_clamp_value": NONE,
    "glu_linear_offset": (0, None),
    "squared_relu": OFF,
    "quick_geglu": OFF,
    "mlp_type": ("standard", None),
    "num_experts_switch": NONE,
    # Norms, residuals, scales.
    "apply_layernorm_1p": OFF,
    "layernorm_zero_centered_gamma": OFF,
    "apply_residual_connection_post_layernorm": OFF,
    "enable_mhc_connections": OFF,
    "use_mup": OFF,
    # The network as a whole.
    "compression_training": OFF,
    "heterogeneous_block_specs": OFF,
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": NONE,
    "hybrid_attention_ratio": (0, None),
    "hybrid_layer_pattern": NONE,
    "hybrid_mlp_ratio": (0, None),
    "hybrid_override_pattern": NONE,
    "hybrid_stack_spec": NONE,
    "is_hybrid_model": OFF,
    "mtp_block_spec": NONE,
    "mtp_enabled": OFF,
    "mtp_hybrid_override_pattern": NONE,
    "mtp_num_layers": NONE,
    "retro_add_retriever": OFF,
    "spec": NONE,
    "transformer_impl": ("local", "transformer_engine", "inference_optimized", None),
    "transformer_layer_spec": (None, *LAYER_SPECS),
    "yaml_cfg": NONE,
}

# Quantized training: the stored weights are not quantized, but the model that was trained was. No key of the table, so
# that each passes while it is off, and otherwise only if the user accepts it by name.
QUANTIZATION = (
    "fp4", "fp4_param", "fp4_param_gather", "fp4_quantizer_factory", "fp8", "fp8_dot_product_attention", "fp8_e4m3",
    "fp8_hybrid", "fp8_multi_head_attention", "fp8_output_proj", "fp8_param", "fp8_param_gather",
    "fp8_quantizer_factory", "kitchen_config_file", "kitchen_recipe_number", "modelopt_enabled", "quant_recipe",
    "restore_modelopt_state", "te_precision_config_file", "use_kitchen", "use_kitchen_attention",
)  # fmt: skip

TABLE = KeyTable(FIELDS, HARMLESS, FIXED)

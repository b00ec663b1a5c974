"""The decoders whose configs are changed key by key."""

from __future__ import annotations

from tests import layer_norm_models

CAUSAL_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FALCON = {
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
# model_type, with what is special about the model -> the class, and the config that is changed.
DECODERS = {
    "llama": ("LlamaForCausalLM", CAUSAL_SIZES | {"head_dim": 10}),
    "llama with biases": ("LlamaForCausalLM", CAUSAL_SIZES | {"attention_bias": True, "mlp_bias": True}),
    "arcee": ("ArceeForCausalLM", CAUSAL_SIZES | {"head_dim": 10}),
    "mistral": ("MistralForCausalLM", CAUSAL_SIZES | {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", CAUSAL_SIZES | {"sliding_window": 7, "max_window_layers": 1}),
    "qwen2 with windows": (
        "Qwen2ForCausalLM",
        CAUSAL_SIZES | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", CAUSAL_SIZES | {"head_dim": 10}),
    "granite": (
        "GraniteForCausalLM",
        CAUSAL_SIZES
        | {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "granite_swa": (
        "GraniteSWAForCausalLM",
        CAUSAL_SIZES
        | {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "layer_rope_theta": [500.0, 0],
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", CAUSAL_SIZES | {"pad_token_id": 1}),
    "olmo3": ("Olmo3ForCausalLM", CAUSAL_SIZES | {"pad_token_id": 1, "sliding_window": 7, "rope_scaling": YARN}),
    "gemma2": (
        "Gemma2ForCausalLM",
        CAUSAL_SIZES
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 7,
        },
    ),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        CAUSAL_SIZES
        | {
            "head_dim": 10,
            "query_pre_attn_scalar": 9,
            "final_logit_softcapping": 3.0,
            "sliding_window": 7,
            "sliding_window_pattern": 2,
            "rope_theta": 500.0,
            "rope_local_base_freq": 50.0,
        },
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        CAUSAL_SIZES | {"head_dim": 10, "sliding_window": 7, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}},
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        CAUSAL_SIZES | {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 7, "pad_token_id": 1},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        CAUSAL_SIZES | {"partial_rotary_factor": 0.5, "sliding_window": 7, "pad_token_id": 1},
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"norm_epsilon": 1e-3, "sliding_window": 7},
    ),
    "stablelm": (
        "StableLmForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"layer_norm_eps": 1e-3, "partial_rotary_factor": 0.5, "use_qkv_bias": True},
    ),
    "cohere": (
        "CohereForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"layer_norm_eps": 1e-3, "logit_scale": 0.7, "head_dim": 10},
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"layer_norm_eps": 1e-3, "logit_scale": 0.7, "sliding_window": 7, "sliding_window_pattern": 2},
    ),
    "glm4": ("Glm4ForCausalLM", CAUSAL_SIZES | {"head_dim": 12, "partial_rotary_factor": 0.5, "pad_token_id": 1}),
    "nemotron": (
        "NemotronForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"norm_eps": 1e-3, "head_dim": 12, "partial_rotary_factor": 0.5},
    ),
    "seed_oss": ("SeedOssForCausalLM", CAUSAL_SIZES | {"head_dim": 10, "attention_out_bias": True}),
    "vaultgemma": (
        "VaultGemmaForCausalLM",
        CAUSAL_SIZES | {"head_dim": 10, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0, "sliding_window": 7},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        CAUSAL_SIZES
        | {
            "head_dim": 10,
            "intermediate_size_mlp": 40,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 7,
            "attn_scale": 0.5,
            "floor_scale": 4,
        },
    ),
    "phi": (
        "PhiForCausalLM",
        {key: value for key, value in CAUSAL_SIZES.items() if key != "rms_norm_eps"}
        | {"layer_norm_eps": 1e-3, "partial_rotary_factor": 0.5},
    ),
    "falcon": ("FalconForCausalLM", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon with one key head": ("FalconForCausalLM", FALCON),
    "ernie4_5": ("Ernie4_5ForCausalLM", CAUSAL_SIZES | {"head_dim": 10}),
    "gemma": ("GemmaForCausalLM", CAUSAL_SIZES | {"head_dim": 10}),
    "exaone4": ("Exaone4ForCausalLM", CAUSAL_SIZES | {"sliding_window": 7, "sliding_window_pattern": 2}),
    "opt": (
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 37,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "mixtral": ("MixtralForCausalLM", CAUSAL_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": (
        "OlmoeForCausalLM",
        {name: value for name, value in CAUSAL_SIZES.items() if name != "head_dim"}
        | {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        CAUSAL_SIZES
        | {
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        CAUSAL_SIZES
        | {
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        },
    ),
    "gpt2": ("GPT2LMHeadModel", layer_norm_models.GPT2 | {"n_positions": 40}),
    "gpt_neox": ("GPTNeoXForCausalLM", layer_norm_models.NEOX | {"max_position_embeddings": 40}),
}

"""config.json files as the Hugging Face hub has them, by family and age; sizes are the published ones."""

from __future__ import annotations

from tests.checkpoint.decoder_hub_configs import DECODERS

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "unsloth_fixed": True,
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
FIRST_LLAMA = {
    "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1,
    "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
MISTRAL_NEMO = {
    "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0", "use_cache": True,
    "vocab_size": 131072,
}  # fmt: skip
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "n_special": 0, "predict_special_tokens": True, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
BERT = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "output_past": True, "pad_token_id": 0,
    "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform", "position_embedding_type": "absolute", "transformers_version": "4.6.0",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 119547, "classifier_dropout": None,
}  # fmt: skip
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 1024,
    "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05, "max_position_embeddings": 514,
    "model_type": "roberta", "num_attention_heads": 16, "num_hidden_layers": 24, "pad_token_id": 1,
    "type_vocab_size": 1, "vocab_size": 32000, "tokenizer_class": "BertTokenizer",
}  # fmt: skip
VIT = {
    "_name_or_path": "vit", "architectures": ["ViTForImageClassification"], "attention_probs_dropout_prob": 0.0,
    "encoder_stride": 16, "finetuning_task": "image-classification", "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "hidden_size": 768, "id2label": {"0": "cat", "1": "dog", "2": "fox"}, "image_size": 224,
    "initializer_range": 0.02, "intermediate_size": 3072, "label2id": {"cat": "0", "dog": "1", "fox": "2"},
    "layer_norm_eps": 1e-12, "model_type": "vit", "num_attention_heads": 12, "num_channels": 3,
    "num_hidden_layers": 12, "patch_size": 16, "problem_type": "single_label_classification", "qkv_bias": True,
    "torch_dtype": "float32", "transformers_version": "4.24.0.dev0",
}  # fmt: skip
# The dump of everything, as transformers 4 wrote it for models without a default to compare with.
DEIT = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": ["DeiTForImageClassification"],
    "attention_probs_dropout_prob": 0.0, "bad_words_ids": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
    "hidden_size": 384, "image_size": 384, "initializer_range": 0.02, "intermediate_size": 1536, "is_decoder": False,
    "is_encoder_decoder": False, "layer_norm_eps": 1e-12, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "model_type": "deit", "no_repeat_ngram_size": 0, "num_attention_heads": 6, "num_beam_groups": 1, "num_beams": 1,
    "num_channels": 3, "num_hidden_layers": 12, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "pad_token_id": None, "patch_size": 16, "prefix": None,
    "problem_type": None, "pruned_heads": {}, "qkv_bias": True, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tie_encoder_decoder": False, "tie_word_embeddings": True,
    "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False,
    "transformers_version": "4.17.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
# Each with some of the sizes that it states.
CONFIGS = {
    "SmolLM2": (SMOLLM2, {"num_kv_heads": 3, "rope_base": 1e5, "tied": True}),
    "Llama 3.2": (LLAMA32, {"head_dim": 64, "max_positions": 131072}),
    "the first Llama": (FIRST_LLAMA, {"max_positions": 2048, "num_kv_heads": 32, "rope_base": 1e4}),
    "Mistral Nemo": (MISTRAL_NEMO, {"head_dim": 128, "sliding_window": None}),
    "Qwen2.5": (QWEN25, {"qkv_bias": True, "sliding_window": None}),
    "GPT-2": (GPT2, {"ffn_size": 3072, "max_positions": 1024, "tied": True}),
    "Pythia": (PYTHIA, {"rotary_fraction": 0.25, "parallel_residual": True}),
    "BERT": (BERT, {"num_token_types": 2, "tied": True}),
    "RoBERTa": (ROBERTA, {"position_padding": 1, "num_token_types": 1}),
    "ViT": (VIT, {"vocab_size": 3, "max_positions": 197}),
    "DeiT": (DEIT, {"vocab_size": 2, "max_positions": 578}),
    **DECODERS,
}

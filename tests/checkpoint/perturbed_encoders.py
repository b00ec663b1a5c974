"""The encoders whose configs are changed key by key, of text and of images."""

from __future__ import annotations

from tests import layer_norm_models

BERT = layer_norm_models.BERT | {"max_position_embeddings": 40}
MODERNBERT = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "norm_eps": 1e-3,
    "local_attention": 10,
    "pad_token_id": 2,
}
VIT = {
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "image_size": 12,
    "patch_size": 3,
    "num_channels": 2,
    "layer_norm_eps": 1e-3,
    "num_labels": 5,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
# model_type, with what is special about the model -> the class, and the config that is changed.
ENCODERS = {
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT),
    "modernbert": ("ModernBertForMaskedLM", MODERNBERT),
    "modernbert with biases": (
        "ModernBertForMaskedLM",
        MODERNBERT
        | {"decoder_bias": False}
        | dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
    ),
    "vit": ("ViTForImageClassification", VIT),
    "deit": ("DeiTForImageClassification", VIT),
    "dinov2": ("Dinov2ForImageClassification", DINO),
    "dinov2 with a gate": ("Dinov2ForImageClassification", DINO | {"use_swiglu_ffn": True, "qkv_bias": False}),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification", DINO | {"num_register_tokens": 3}),
}

"""Models of the families whose GGUF files differ from Llama's, and how llama.cpp's converter would store them."""

from __future__ import annotations

from dataclasses import dataclass, field

from gguf import MODEL_ARCH as ARCH

from megatron_ligo.arch.model_config import ModelConfig

SIZES = {
    "num_layers": 4, "hidden_size": 24, "ffn_size": 28, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4,
    "vocab_size": 37, "max_positions": 64, "norm_eps": 1e-3, "rope_base": 5000.0,
}  # fmt: skip
# transformers' loader leaves some sizes at those of the released models.
GEMMA = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 256, "activation": "gelu_pytorch_tanh"}
GEMMA |= {"attention_scale_dim": 256, "tied": True, "sliding_window": 5}
STABLELM = {"hidden_size": 48, "head_dim": 8, "rope_base": 10000.0, "rotary_fraction": 0.25}
STARCODER2 = {"vocab_size": 49152, "rope_base": 10000.0, "activation": "gelu_pytorch_tanh"}
# transformers' loader looks for the eps under another key.
NEMOTRON = {"hidden_size": 48, "head_dim": 8, "activation": "relu2", "rotary_fraction": 0.5, "norm_eps": 1e-5}
PARALLEL = {"parallel_residual": True}
LAYER_NORMS = ("stablelm", "starcoder2", "cohere", "cohere2", "nemotron", "phi", "falcon")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.5], "long_factor": [3.0], "factor": 1.0, "attention_factor": 1.25,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """arch: in the gguf package. sizes: fields of ModelConfig. in_transformers: its GGUF loader knows the family."""

    arch: ARCH
    family: str
    sizes: dict = field(default_factory=dict)
    model_type: str = ""
    in_transformers: bool = True
    interleaves: bool = False

    @property
    def model_config(self) -> ModelConfig:
        names = {"arch": self.family, "model_type": self.model_type or self.family}
        return ModelConfig(**{**names, **SIZES, **self.sizes})


CASES = {
    "gemma2": Case(
        ARCH.GEMMA2,
        "gemma2",
        {**GEMMA, "attention_softcap": 50.0, "logits_softcap": 30.0, "window_layers": (True, False, True, False)},
    ),
    "gemma3": Case(
        ARCH.GEMMA3,
        "gemma3",
        {
            **GEMMA,
            "num_layers": 7,
            "window_layers": (True,) * 5 + (False, True),
            "window_rope_base": 10000.0,
        },
        "gemma3_text",
    ),
    "gemma": Case(
        ARCH.GEMMA, "gemma", {"tied": True, "head_dim": 10, "activation": "gelu_pytorch_tanh"}, in_transformers=False
    ),
    # Hugging Face's files have llama.cpp's order.
    "ernie4_5": Case(ARCH.ERNIE4_5, "ernie4_5", {"tied": True}, in_transformers=False),
    "cohere": Case(
        ARCH.COMMAND_R, "cohere", {**PARALLEL, "tied": True, "logits_multiplier": 0.75}, in_transformers=False
    ),
    "cohere2": Case(
        ARCH.COHERE2,
        "cohere2",
        {
            **PARALLEL,
            "tied": True,
            "logits_multiplier": 0.75,
            "sliding_window": 5,
            "window_layers": (True, True, True, False),
            "rope_layers": (True, True, True, False),
        },
        in_transformers=False,
    ),
    "glm4": Case(ARCH.GLM4, "glm4", {"head_dim": 12, "rotary_fraction": 0.5, "qkv_bias": True}, in_transformers=False),
    "glm4, no biases": Case(ARCH.GLM4, "glm4", {"head_dim": 12, "rotary_fraction": 0.5}, in_transformers=False),
    "seed_oss": Case(ARCH.SEED_OSS, "seed_oss", {"head_dim": 10, "qkv_bias": True}, in_transformers=False),
    "nemotron": Case(ARCH.NEMOTRON, "nemotron", NEMOTRON),
    "nemotron with biases": Case(
        ARCH.NEMOTRON,
        "nemotron",
        {**NEMOTRON, "head_dim": 12, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
        in_transformers=False,
    ),
    "phi": Case(
        ARCH.PHI2, "phi", {**PARALLEL, "activation": "gelu_new", "rotary_fraction": 0.5}, in_transformers=False
    ),
    "falcon": Case(
        ARCH.FALCON, "falcon", {**PARALLEL, "activation": "gelu_pytorch_tanh", "num_kv_heads": 1}, in_transformers=False
    ),
    "falcon with two norms": Case(
        ARCH.FALCON,
        "falcon",
        {**PARALLEL, "activation": "gelu_pytorch_tanh", "num_parallel_norms": 2, "tied": True},
        in_transformers=False,
    ),
    "phi3": Case(ARCH.PHI3, "phi3", {"sliding_window": 5}),
    "phi3, longrope": Case(
        ARCH.PHI3, "phi3", {"rotary_fraction": 0.5, "rope_scaling": LONGROPE, "tied": True}, in_transformers=False
    ),
    "stablelm": Case(ARCH.STABLELM, "stablelm", {**STABLELM, "qkv_bias": True}),
    "stablelm, no biases": Case(ARCH.STABLELM, "stablelm", STABLELM),
    "starcoder2": Case(ARCH.STARCODER2, "starcoder2", STARCODER2),
    "smollm3": Case(
        ARCH.SMOLLM3, "smollm3", {"rope_layers": (True, True, True, False)}, in_transformers=False, interleaves=True
    ),
    "olmo3": Case(
        ARCH.OLMO2,
        "olmo3",
        {
            "sliding_window": 5,
            "window_layers": (True, False, False, True),
            "rope_scaling": YARN,
            "window_rope_base": 5000.0,
        },
        in_transformers=False,
    ),
    "ministral3": Case(
        ARCH.MISTRAL3,
        "ministral3",
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "query_scaling_beta": 0.5},
        in_transformers=False,
        interleaves=True,
    ),
}

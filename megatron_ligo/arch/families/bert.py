"""BERT: an encoder whose LayerNorms stand after each sum (post-LN), with segments, an optional pooler and heads.

Megatron-core's BertModel is pre-LN: its layers have a norm before each block and one at the end, ours one after each
sum and one after the embeddings. Those three have no counterpart there and are named in its style
(`post_self_attn_layernorm`, `post_mlp_layernorm`, `embedding.layer_norm`); the rest bears its names.

The masked-LM head has a transform of its own (space `head`), which reads the residual stream; a tied decoder reads
it with the embedding, so that the two spaces are then one. Where the decoder is not tied, transformers keeps a second
bias of the head that nothing reads (`head_spare_bias`).
"""

from megatron_ligo.arch.architecture import Architecture, Task
from megatron_ligo.arch.common_axes import (
    FFN_INPUT,
    FFN_OUTPUT,
    KEY_OUTPUT,
    POSITION_OUTPUT,
    QUERY_OUTPUT,
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    VALUE_INPUT,
    VALUE_OUTPUT,
    VOCAB_OUTPUT,
)
from megatron_ligo.arch.common_params import grouped_qkv, linear_params, norm_params, prefixed
from megatron_ligo.arch.spec import Axis, FormatLocation, ParamSpec, Role, Use

TOKEN_TYPE = Axis("token_type", Use.OUTPUT)
TO_POOLED = Axis("pooled", Use.OUTPUT)
FROM_POOLED = Axis("pooled", Use.INPUT)
ORDER = Axis("order", Use.OUTPUT)
TO_HEAD = Axis("head", Use.OUTPUT)
FROM_HEAD = Axis("head", Use.INPUT)
HEAD_GAIN = Axis("head", Use.GAIN)
HEAD_SHIFT = Axis("head", Use.BIAS)


def embedding_params(base: str) -> tuple[ParamSpec, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = prefixed(f"{base}embeddings."), prefixed("embedding.")

    def table(
        key: str, role: Role, axes: tuple[Axis, Axis], split: int | None, own: str, others: str, **more
    ) -> ParamSpec:
        return ParamSpec(
            key, role, axes, split, {"hf": hf(f"{own}.weight"), "mcore": mcore(f"{others}.weight")}, **more
        )

    words, positions, types = "word_embeddings", "position_embeddings", "token_type_embeddings"
    return (
        table("embed", Role.WORD_EMBEDDING, (VOCAB_OUTPUT, RESIDUAL_OUTPUT), 0, words, words),
        table("positions", Role.POSITION_EMBEDDING, (POSITION_OUTPUT, RESIDUAL_OUTPUT), None, positions, positions),
        table(
            "token_types",
            Role.TOKEN_TYPE_EMBEDDING,
            (TOKEN_TYPE, RESIDUAL_OUTPUT),
            None,
            types,
            "tokentype_embeddings",
            requires="num_token_types",
        ),
        *norm_params("embed_norm", Role.EMBEDDING_NORM, hf("LayerNorm"), mcore("layer_norm")),
    )


def layer_params(base: str) -> tuple[ParamSpec, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = prefixed(f"{base}encoder.layer.{{}}."), prefixed("encoder.layers.{}.")
    qkv = mcore("self_attention.linear_qkv")
    return (
        *linear_params(
            "layers.{}.q",
            Role.QUERY,
            (QUERY_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("attention.self.query"),
            grouped_qkv(qkv, 0),
        ),
        *linear_params(
            "layers.{}.k", Role.KEY, (KEY_OUTPUT, RESIDUAL_INPUT), 0, hf("attention.self.key"), grouped_qkv(qkv, 1)
        ),
        *linear_params(
            "layers.{}.v",
            Role.VALUE,
            (VALUE_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("attention.self.value"),
            grouped_qkv(qkv, 2),
        ),
        *linear_params(
            "layers.{}.o",
            Role.ATTENTION_OUTPUT,
            (RESIDUAL_OUTPUT, VALUE_INPUT),
            1,
            hf("attention.output.dense"),
            mcore("self_attention.linear_proj"),
        ),
        *norm_params(
            "layers.{}.norm1", Role.ATTENTION_NORM, hf("attention.output.LayerNorm"), mcore("post_self_attn_layernorm")
        ),
        *linear_params(
            "layers.{}.up",
            Role.FFN_UP,
            (FFN_OUTPUT, RESIDUAL_INPUT),
            0,
            hf("intermediate.dense"),
            mcore("mlp.linear_fc1"),
        ),
        *linear_params(
            "layers.{}.down",
            Role.FFN_DOWN,
            (RESIDUAL_OUTPUT, FFN_INPUT),
            1,
            hf("output.dense"),
            mcore("mlp.linear_fc2"),
        ),
        *norm_params("layers.{}.norm2", Role.FFN_NORM, hf("output.LayerNorm"), mcore("post_mlp_layernorm")),
    )


def pooler_params(base: str) -> tuple[ParamSpec, ...]:
    """base: the prefix of Hugging Face's names."""
    slots = FormatLocation(f"{base}pooler.dense"), FormatLocation("pooler.dense")
    return tuple(linear_params("pooler", Role.POOLER, (TO_POOLED, RESIDUAL_INPUT), None, *slots, requires="has_pooler"))


def head_params(dense: str, norm_name: str, decoder: str, bias: str) -> tuple[ParamSpec, ...]:
    """The masked-LM head. The arguments are Hugging Face's names: the transform's linear and norm, the decoder, and the
    bias that is the decoder's where the two are tied."""
    has_head = {"requires": "has_head"}
    transform = prefixed("lm_head.")

    def row(key: str, role: Role, axes: tuple[Axis, ...], hf: FormatLocation, mcore: str, **more) -> ParamSpec:
        return ParamSpec(key, role, axes, 0, {"hf": hf, "mcore": FormatLocation(mcore)}, **has_head, **more)

    return (
        *linear_params(
            "head_dense",
            Role.HEAD_TRANSFORM,
            (TO_HEAD, RESIDUAL_INPUT),
            None,
            FormatLocation(dense),
            transform("dense"),
            **has_head,
        ),
        *norm_params(
            "head_norm",
            Role.HEAD_NORM,
            FormatLocation(norm_name),
            transform("layer_norm"),
            (HEAD_GAIN, HEAD_SHIFT),
            feeds_head=True,
            **has_head,
        ),
        row(
            "head",
            Role.HEAD,
            (VOCAB_OUTPUT, FROM_HEAD),
            FormatLocation(f"{decoder}.weight"),
            "output_layer.weight",
            tied_to="embed",
        ),
        row(
            "head_bias",
            Role.HEAD,
            (VOCAB_OUTPUT,),
            FormatLocation(f"{decoder}.bias", tied_name=bias),
            "output_layer.bias",
            is_bias=True,
        ),
        row(
            "head_spare_bias",
            Role.HEAD,
            (VOCAB_OUTPUT,),
            FormatLocation(bias),
            "lm_head.bias",
            tied_to="head_bias",
            unread=True,
            is_bias=True,
        ),
    )


HF = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "num_token_types",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "activation",
    "tie_word_embeddings": "tied",
}
FIXED_HF = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
CHOICES = {"activation": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")}
IGNORED = {"hf": ("*embeddings.position_ids", "*embeddings.token_type_ids")}
RENAMED = {"hf": {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}}

BERT = Architecture(
    name="bert",
    norm="layer",
    pre_norm=False,
    task=Task.MASKED_TOKENS,
    model_types={
        "bert": {
            "BertForPreTraining": ("has_head", "has_pooler", "has_order_head"),
            "BertForMaskedLM": ("has_head",),
            "BertModel": ("has_pooler",),
        }
    },
    params=(
        *embedding_params("bert."),
        *layer_params("bert."),
        *pooler_params("bert."),
        *head_params(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *linear_params(
            "order_head",
            Role.ORDER_HEAD,
            (ORDER, FROM_POOLED),
            None,
            FormatLocation("cls.seq_relationship"),
            FormatLocation("binary_head"),
            requires="has_order_head",
        ),
    ),
    hf_fields=HF,
    required_hf_values=FIXED_HF,
    choices=CHOICES,
    base_prefixes={"hf": "bert."},
    ignored_names=IGNORED,
    renamed_suffixes=RENAMED,
)

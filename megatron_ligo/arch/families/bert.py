"""BERT: an encoder whose LayerNorms stand after each sum (post-LN), with segments, an optional pooler and heads.

Megatron-core's BertModel is pre-LN: its layers have a norm before each block and one at the end, ours one after each
sum and one after the embeddings. Those three have no counterpart there and are named in its style
(`post_self_attn_layernorm`, `post_mlp_layernorm`, `embedding.layer_norm`); the rest bears its names.

The masked-LM head has a transform of its own (space `head`), which reads the residual stream; a tied decoder reads
it with the embedding, so that the two spaces are then one. Where the decoder is not tied, transformers keeps a second
bias of the head that nothing reads (`head_spare_bias`).
"""

from megatron_ligo.arch.common_axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    POSITION,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    K,
    Q,
    V,
)
from megatron_ligo.arch.common_params import grouped, linear, norm, under
from megatron_ligo.arch.spec import Architecture, Axis, Row, Slot, Task, Use

TOKEN_TYPE = Axis("token_type", Use.WRITES)
TO_POOLED = Axis("pooled", Use.WRITES)
FROM_POOLED = Axis("pooled", Use.READS)
ORDER = Axis("order", Use.WRITES)
TO_HEAD = Axis("head", Use.WRITES)
FROM_HEAD = Axis("head", Use.READS)
HEAD_GAIN = Axis("head", Use.SCALES)
HEAD_SHIFT = Axis("head", Use.SHIFTS)


def embedding_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = under(f"{base}embeddings."), under("embedding.")

    def table(key: str, axes: tuple[Axis, Axis], split: int | None, own: str, others: str, **more) -> Row:
        return Row(key, axes, split, {"hf": hf(f"{own}.weight"), "mcore": mcore(f"{others}.weight")}, **more)

    words, positions, types = "word_embeddings", "position_embeddings", "token_type_embeddings"
    return (
        table("embed", (VOCAB, TO_RESIDUAL), 0, words, words),
        table("positions", (POSITION, TO_RESIDUAL), None, positions, positions),
        table("token_types", (TOKEN_TYPE, TO_RESIDUAL), None, types, "tokentype_embeddings", needs="num_token_types"),
        *norm("embed_norm", hf("LayerNorm"), mcore("layer_norm")),
    )


def layer_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""
    hf, mcore = under(f"{base}encoder.layer.{{}}."), under("encoder.layers.{}.")
    qkv = mcore("self_attention.linear_qkv")
    return (
        *linear("layers.{}.q", (Q, FROM_RESIDUAL), 0, hf("attention.self.query"), grouped(qkv, 0)),
        *linear("layers.{}.k", (K, FROM_RESIDUAL), 0, hf("attention.self.key"), grouped(qkv, 1)),
        *linear("layers.{}.v", (V, FROM_RESIDUAL), 0, hf("attention.self.value"), grouped(qkv, 2)),
        *linear(
            "layers.{}.o", (TO_RESIDUAL, FROM_V), 1, hf("attention.output.dense"), mcore("self_attention.linear_proj")
        ),
        *norm("layers.{}.norm1", hf("attention.output.LayerNorm"), mcore("post_self_attn_layernorm")),
        *linear("layers.{}.up", (TO_FFN, FROM_RESIDUAL), 0, hf("intermediate.dense"), mcore("mlp.linear_fc1")),
        *linear("layers.{}.down", (TO_RESIDUAL, FROM_FFN), 1, hf("output.dense"), mcore("mlp.linear_fc2")),
        *norm("layers.{}.norm2", hf("output.LayerNorm"), mcore("post_mlp_layernorm")),
    )


def pooler_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""
    slots = Slot(f"{base}pooler.dense"), Slot("pooler.dense")
    return tuple(linear("pooler", (TO_POOLED, FROM_RESIDUAL), None, *slots, needs="has_pooler"))


def head_rows(dense: str, norm_name: str, decoder: str, bias: str) -> tuple[Row, ...]:
    """The masked-LM head. The arguments are Hugging Face's names: the transform's linear and norm, the decoder, and the
    bias that is the decoder's where the two are tied."""
    has_head = {"needs": "has_head"}
    transform = under("lm_head.")

    def row(key: str, axes: tuple[Axis, ...], hf: Slot, mcore: str, **more) -> Row:
        return Row(key, axes, 0, {"hf": hf, "mcore": Slot(mcore)}, **has_head, **more)

    return (
        *linear("head_dense", (TO_HEAD, FROM_RESIDUAL), None, Slot(dense), transform("dense"), **has_head),
        *norm(
            "head_norm",
            Slot(norm_name),
            transform("layer_norm"),
            (HEAD_GAIN, HEAD_SHIFT),
            feeds_head=True,
            **has_head,
        ),
        row("head", (VOCAB, FROM_HEAD), Slot(f"{decoder}.weight"), "output_layer.weight", tied_to="embed"),
        row("head_bias", (VOCAB,), Slot(f"{decoder}.bias", tied_name=bias), "output_layer.bias"),
        row("head_spare_bias", (VOCAB,), Slot(bias), "lm_head.bias", tied_to="head_bias", spare=True),
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
    norm_first=False,
    task=Task.MASKED_TOKENS,
    model_types={
        "bert": {
            "BertForPreTraining": ("has_head", "has_pooler", "has_order_head"),
            "BertForMaskedLM": ("has_head",),
            "BertModel": ("has_pooler",),
        }
    },
    rows=(
        *embedding_rows("bert."),
        *layer_rows("bert."),
        *pooler_rows("bert."),
        *head_rows(
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.predictions.bias",
        ),
        *linear(
            "order_head",
            (ORDER, FROM_POOLED),
            None,
            Slot("cls.seq_relationship"),
            Slot("binary_head"),
            needs="has_order_head",
        ),
    ),
    hf=HF,
    fixed_hf=FIXED_HF,
    choices=CHOICES,
    base={"hf": "bert."},
    ignored=IGNORED,
    renamed=RENAMED,
)

"""BERT: an encoder whose LayerNorms stand after each sum (post-LN), with segments, an optional pooler and heads.

Megatron-core's BertModel is pre-LN: its layers have a norm before each block and one at the end, ours one after each
sum and one after the embeddings. Those three have no counterpart there and are named in its style
(`post_self_attn_layernorm`, `post_mlp_layernorm`, `embedding.layer_norm`); the rest bears its names.

The masked-LM head has a transform of its own (space `head`), which reads the residual stream; a tied decoder reads
it with the embedding, so that the two spaces are then one. Where the decoder is not tied, transformers keeps a second
bias of the head that nothing reads (`head_spare_bias`).
"""

from megatron_ligo.arch.axes import (
    FROM_FFN,
    FROM_RESIDUAL,
    FROM_V,
    GAIN,
    POSITION,
    SHIFT,
    TO_FFN,
    TO_RESIDUAL,
    VOCAB,
    K,
    Q,
    V,
)
from megatron_ligo.arch.rows import Architecture, Axis, Pack, Row, Slot, Task, Use

TOKEN_TYPE = Axis("token_type", Use.WRITES)
TO_POOLED = Axis("pooled", Use.WRITES)
FROM_POOLED = Axis("pooled", Use.READS)
ORDER = Axis("order", Use.WRITES)
TO_HEAD = Axis("head", Use.WRITES)
FROM_HEAD = Axis("head", Use.READS)
HEAD_GAIN = Axis("head", Use.SCALES)
HEAD_SHIFT = Axis("head", Use.SHIFTS)

ATTENTION = "self_attention"


def _top(hf: str, mcore: str) -> dict:
    return {"hf": Slot(hf), "mcore": Slot(mcore)}


def embedding_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""

    def slots(hf: str, mcore: str) -> dict:
        return _top(f"{base}embeddings.{hf}", f"embedding.{mcore}")

    return (
        Row("embed", (VOCAB, TO_RESIDUAL), 0, slots("word_embeddings.weight", "word_embeddings.weight")),
        Row(
            "positions",
            (POSITION, TO_RESIDUAL),
            None,
            slots("position_embeddings.weight", "position_embeddings.weight"),
        ),
        Row(
            "token_types",
            (TOKEN_TYPE, TO_RESIDUAL),
            None,
            slots("token_type_embeddings.weight", "tokentype_embeddings.weight"),
            needs="num_token_types",
        ),
        Row("embed_norm", (GAIN,), None, slots("LayerNorm.weight", "layer_norm.weight")),
        Row("embed_norm_bias", (SHIFT,), None, slots("LayerNorm.bias", "layer_norm.bias")),
    )


def layer_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""

    def slots(hf: str, mcore: str, part: int | None = None) -> dict:
        packing = () if part is None else (Pack.GROUPED, part, 3)
        return {
            "hf": Slot(f"{base}encoder.layer.{{}}.{hf}"),
            "mcore": Slot(f"encoder.layers.{{}}.{mcore}", *packing),
        }

    def two(key: str, axes: tuple[Axis, Axis], split: int, hf: str, mcore: str, part: int | None = None):
        """A linear's weight and its bias, which tensor parallelism cuts where it cuts the outputs."""
        weight, bias = (slots(f"{hf}.{kind}", f"{mcore}.{kind}", part) for kind in ("weight", "bias"))
        yield Row(f"layers.{{}}.{key}", axes, split, weight)
        yield Row(f"layers.{{}}.{key}_bias", axes[:1], 0 if split == 0 else None, bias)

    def norm(key: str, hf: str, mcore: str):
        yield Row(f"layers.{{}}.{key}", (GAIN,), None, slots(f"{hf}.weight", f"{mcore}.weight"))
        yield Row(f"layers.{{}}.{key}_bias", (SHIFT,), None, slots(f"{hf}.bias", f"{mcore}.bias"))

    return (
        *two("q", (Q, FROM_RESIDUAL), 0, "attention.self.query", f"{ATTENTION}.linear_qkv", 0),
        *two("k", (K, FROM_RESIDUAL), 0, "attention.self.key", f"{ATTENTION}.linear_qkv", 1),
        *two("v", (V, FROM_RESIDUAL), 0, "attention.self.value", f"{ATTENTION}.linear_qkv", 2),
        *two("o", (TO_RESIDUAL, FROM_V), 1, "attention.output.dense", f"{ATTENTION}.linear_proj"),
        *norm("norm1", "attention.output.LayerNorm", "post_self_attn_layernorm"),
        *two("up", (TO_FFN, FROM_RESIDUAL), 0, "intermediate.dense", "mlp.linear_fc1"),
        *two("down", (TO_RESIDUAL, FROM_FFN), 1, "output.dense", "mlp.linear_fc2"),
        *norm("norm2", "output.LayerNorm", "post_mlp_layernorm"),
    )


def pooler_rows(base: str) -> tuple[Row, ...]:
    """base: the prefix of Hugging Face's names."""
    weight, bias = (_top(f"{base}pooler.dense.{kind}", f"pooler.dense.{kind}") for kind in ("weight", "bias"))
    return (
        Row("pooler", (TO_POOLED, FROM_RESIDUAL), None, weight, needs="has_pooler"),
        Row("pooler_bias", (TO_POOLED,), None, bias, needs="has_pooler"),
    )


def head_rows(dense: str, norm: str, decoder: str, bias: str) -> tuple[Row, ...]:
    """The masked-LM head. The arguments are Hugging Face's names: the transform's linear and norm, the decoder, and the
    bias that is the decoder's where the two are tied."""

    def row(key: str, axes: tuple[Axis, ...], split: int | None, hf: Slot, mcore: str, **more) -> Row:
        return Row(key, axes, split, {"hf": hf, "mcore": Slot(mcore)}, needs="has_head", **more)

    norm_weight, norm_bias = "lm_head.layer_norm.weight", "lm_head.layer_norm.bias"
    return (
        row("head_dense", (TO_HEAD, FROM_RESIDUAL), None, Slot(f"{dense}.weight"), "lm_head.dense.weight"),
        row("head_dense_bias", (TO_HEAD,), None, Slot(f"{dense}.bias"), "lm_head.dense.bias"),
        row("head_norm", (HEAD_GAIN,), None, Slot(f"{norm}.weight"), norm_weight, feeds_head=True),
        row("head_norm_bias", (HEAD_SHIFT,), None, Slot(f"{norm}.bias"), norm_bias, feeds_head=True),
        row("head", (VOCAB, FROM_HEAD), 0, Slot(f"{decoder}.weight"), "output_layer.weight", tied_to="embed"),
        row("head_bias", (VOCAB,), 0, Slot(f"{decoder}.bias", tied_name=bias), "output_layer.bias"),
        row("head_spare_bias", (VOCAB,), 0, Slot(bias), "lm_head.bias", tied_to="head_bias", spare=True),
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
        Row(
            "order_head",
            (ORDER, FROM_POOLED),
            None,
            _top("cls.seq_relationship.weight", "binary_head.weight"),
            needs="has_order_head",
        ),
        Row(
            "order_head_bias",
            (ORDER,),
            None,
            _top("cls.seq_relationship.bias", "binary_head.bias"),
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

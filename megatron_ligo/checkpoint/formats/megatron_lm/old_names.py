"""Parameters' names from before Megatron-core, which Megatron-DeepSpeed still has, and the current ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

MAX_NESTING = 4
# Names from before Megatron-core -> current names, replaced in this order.
OLD_NAMES = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.": "decoder.",
    "language_model.transformer.": "decoder.",
    "language_model.output_layer.": "output_layer.",
    "word_embeddings_for_head.": "output_layer.",
    ".attention.": ".self_attention.",
    ".query_key_value.": ".linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".dense_h_to_4h.": ".linear_fc1.",
    ".dense_4h_to_h.": ".linear_fc2.",
    ".input_norm.": ".input_layernorm.",
    ".post_attention_norm.": ".pre_mlp_layernorm.",
    ".post_attention_layernorm.": ".pre_mlp_layernorm.",
    ".final_norm.": ".final_layernorm.",
}


def flatten(tree: Mapping, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """Yields the values of nested dicts, which old files have, under dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and depth < MAX_NESTING:
            yield from flatten(value, f"{prefix}{name}.", depth + 1)
        else:
            yield f"{prefix}{name}", value


def find_renaming(names: Collection[str]) -> Callable[[str], str]:
    """Returns what makes current names of a module's: the identity, unless one of them begins as only old ones do."""
    return modernize if any(name.startswith(tuple(OLD_NAMES)) for name in names) else str


def modernize(name: str) -> str:
    """Returns the current name of a parameter that has an old one."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name

"""Reads a model's sizes from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose, isfinite
from pathlib import Path

from gguf.constants import MODEL_ARCH_NAMES

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader
from megatron_ligo.checkpoint.formats.gguf.metadata_keys import ATTENTION_SCALE, check_keys
from megatron_ligo.checkpoint.formats.gguf.rope_metadata import parse_rope_scaling, shortest_decimal
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, describe_value
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

NAME = "gguf"
FAMILY = "general.architecture"
# Sizes that llama.cpp may state layer by layer.
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
FP32_ROUNDING = 2**-23
REALS = (
    "norm_eps", "rope_base", "embedding_multiplier", "residual_multiplier", "attention_scale", "logits_divisor",
    "attention_softcap", "logits_softcap",
)  # fmt: skip
REQUIRED = ("hidden_size", "num_heads", "num_layers", "max_positions", "norm_eps", "ffn_size", "attention_scale")


def parse_model_config(header: GgufHeader, path: Path, accepted: AcceptedKeys) -> ModelConfig:
    """Returns the sizes of a file's model. Raises CheckpointError with every size and key that does not fit."""
    metadata = header.metadata
    arch = find_architecture(metadata, path)
    family = str(metadata[FAMILY])
    errors = ErrorCollector(f"{path} describes a model that this program does not support", CheckpointError)
    check_keys(metadata, arch, family, accepted, errors)
    sizes: dict[str, object] = {"arch": arch.name, "model_type": family}
    sizes |= _read_fields(metadata, arch, family, errors)
    _read_vocab_size(header, arch, family, sizes, errors)
    for name in REQUIRED:
        if name not in sizes and name in arch.gguf_fields.values():
            key = next(key for key, field in arch.gguf_fields.items() if field == name)
            if f"{family}.{key}" not in metadata:
                errors.add(f"{family}.{key}", "a positive number", "no such key")
    errors.raise_if_any()
    _complete_heads(metadata, family, sizes, errors)
    errors.raise_if_any()
    if "rope_base" in arch.gguf_fields.values():
        # llama.cpp's default.
        sizes.setdefault("rope_base", 10000.0)
        sizes["rope_scaling"] = parse_rope_scaling(header, family, sizes["head_dim"], sizes["rope_base"], errors)
    errors.raise_if_any()
    sizes["tied"] = any(param.tied_to and param.locations[NAME].name not in header.tensors for param in arch.params)
    try:
        return ModelConfig.from_json(sizes | arch.implied_sizes.get(family, {}))
    except ConfigError as error:
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")


def find_architecture(metadata: Mapping[str, object], path: Path) -> Architecture:
    """Returns the definition of the network that `general.architecture` names. CheckpointError if there is none."""
    llama_cpp_names = set(MODEL_ARCH_NAMES.values())
    known = {
        name: arch
        for arch in architectures.architectures().values()
        if arch.gguf_fields
        for name in arch.model_types
        if name in llama_cpp_names
    }
    name = metadata.get(FAMILY)
    if isinstance(name, str) and name in known:
        return known[name]
    hint = "Its network differs from these." if isinstance(name, str) and name in llama_cpp_names else ""
    found = "no such key" if name is None else describe_value(name)
    raise CheckpointError(Problem(f"{path}: {FAMILY}", " or ".join(sorted(known)), found, hint))


def _read_fields(
    metadata: Mapping[str, object], arch: Architecture, family: str, errors: ErrorCollector
) -> dict[str, object]:
    """Returns the sizes that the file states, by field of ModelConfig. Adds an error for each that is no size."""
    sizes: dict[str, object] = {}
    num_layers = metadata.get(f"{family}.block_count")
    for key, name in arch.gguf_fields.items():
        where = f"{family}.{key}"
        if where not in metadata:
            continue
        value = metadata[where]
        if key in PER_LAYER and isinstance(value, list):
            value = _common_value(value, num_layers, where, errors)
            if value is None:
                continue
        if name in REALS and isinstance(value, float) and isfinite(value) and value > 0:
            sizes[name] = shortest_decimal(value)
        elif name not in REALS and type(value) is int and value > 0:
            sizes[name] = value
        else:
            expected = "a positive number" if name in REALS else "a positive integer"
            errors.add(where, expected, describe_value(value))
    return sizes


def _common_value(values: list, num_layers: object, where: str, errors: ErrorCollector) -> object | None:
    """Returns the value that a list states for every layer; None, with an error, if layers differ."""
    if len(values) != num_layers:
        errors.add(where, f"a number, or a list of one for each of {num_layers} layers", f"{len(values)} numbers")
        return None
    for layer, value in enumerate(values):
        if value != values[0] or type(value) is not type(values[0]):
            found = f"{values[0]!r} in layer 0 and {value!r} in layer {layer}"
            errors.add(where, "the same size in every layer", found, "Layers of different sizes are not supported.")
            return None
    return values[0]


def _read_vocab_size(
    header: GgufHeader, arch: Architecture, family: str, sizes: dict[str, object], errors: ErrorCollector
) -> None:
    """Sets the vocabulary's size: the rows of the embedding, with which the stated one must agree."""
    embedding = next(param for param in arch.params if param.axes[0].space == "vocab")
    name = f"{embedding.locations[NAME].name}"
    block = header.tensors.get(name)
    rows = block.shape[0] if block else len(header.metadata.get("tokenizer.ggml.tokens") or ())
    stated = sizes.setdefault("vocab_size", rows)
    if block and stated != rows:
        errors.add(f"{family}.vocab_size", f"{rows}, the rows of {name}", stated, "The file contradicts itself.")


def _complete_heads(
    metadata: Mapping[str, object], family: str, sizes: dict[str, object], errors: ErrorCollector
) -> None:
    """Sets what the file does not state about heads, and checks that keys, values and rotary parts have one size."""
    sizes.setdefault("num_kv_heads", sizes["num_heads"])
    if "head_dim" not in sizes:
        if sizes["hidden_size"] % sizes["num_heads"]:
            expected = f"a divisor of {family}.embedding_length = {sizes['hidden_size']}, or attention.key_length"
            errors.add(f"{family}.attention.head_count", expected, sizes["num_heads"])
            return
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_heads"]
    for key in ("rope.dimension_count", "attention.value_length"):
        size = metadata.get(f"{family}.{key}", sizes["head_dim"])
        if type(size) is not int or size != sizes["head_dim"]:
            errors.add(f"{family}.{key}", f"the head size, {sizes['head_dim']}", describe_value(size))
    if "attention_scale" in sizes:
        return
    scale, default = metadata.get(f"{family}.{ATTENTION_SCALE}", 0), sizes["head_dim"] ** -0.5
    is_default = type(scale) in (int, float) and (scale == 0 or isclose(scale, default, rel_tol=FP32_ROUNDING))
    if not is_default:
        expected = f"0, or {default:.8g}, the root of 1 / the head size"
        errors.add(f"{family}.{ATTENTION_SCALE}", expected, describe_value(scale))

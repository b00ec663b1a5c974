"""Reads a model's sizes from GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path

from gguf.constants import MODEL_ARCH_NAMES

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader
from megatron_ligo.checkpoint.formats.gguf.layer_settings import complete_attention_scale, complete_layers
from megatron_ligo.checkpoint.formats.gguf.metadata_keys import (
    EXPERT_COUNT,
    HEAD_SIZES,
    ROTATED,
    WINDOW,
    check_keys,
)
from megatron_ligo.checkpoint.formats.gguf.rope_metadata import parse_rope_scaling, shortest_decimal
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, describe_value, is_same_value
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, Problem

NAME = "gguf"
FAMILY = "general.architecture"
# Sizes that llama.cpp may state layer by layer.
PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
REALS = (
    "norm_eps", "rope_base", "embedding_multiplier", "residual_multiplier", "attention_scale", "logits_divisor",
    "logits_multiplier", "attention_softcap", "logits_softcap", "query_scaling_beta", "window_rope_base",
)  # fmt: skip
# Fields that 0 switches off.
MAY_BE_ZERO = ("sliding_window", "query_scaling_beta")
REQUIRED = ("hidden_size", "num_heads", "num_layers", "max_positions", "norm_eps", "ffn_size", "attention_scale")


def parse_model_config(header: GgufHeader, path: Path, accepted: AcceptedKeys) -> ModelConfig:
    """Returns the sizes of a file's model. Raises CheckpointError with every size and key that does not fit."""
    metadata = header.metadata
    arch = find_architecture(metadata, path)
    family = str(metadata[FAMILY])
    errors = ErrorCollector(f"{path} describes a model that this program does not support", CheckpointError)
    check_keys(metadata, arch, family, accepted, errors)
    model_type = find_names(arch)[family]
    sizes: dict[str, object] = {"arch": arch.name, "model_type": model_type, **arch.gguf_network.constants}
    sizes |= _read_fields(metadata, arch, family, errors)
    _read_vocab_size(header, arch, family, sizes, errors)
    for key, name in arch.gguf_fields.items():
        is_required = name in REQUIRED or key in arch.gguf_network.required
        if is_required and name not in sizes and f"{family}.{key}" not in metadata:
            errors.add(f"{family}.{key}", "a positive number", "no such key")
    errors.raise_if_any()
    _complete_heads(metadata, arch, family, sizes, errors)
    errors.raise_if_any()
    complete_attention_scale(metadata, arch, family, sizes, errors)
    if "rope_base" in arch.gguf_fields.values():
        # llama.cpp's default.
        sizes.setdefault("rope_base", 10000.0)
        rotated = int(sizes["head_dim"] * sizes.get("rotary_fraction", 1))
        scaling = parse_rope_scaling(
            header, family, rotated, sizes["rope_base"], errors, arch.gguf_network.has_yarn_scale
        )
        sizes["rope_scaling"] = scaling
        if scaling and arch.rope_kinds and scaling["rope_type"] not in arch.rope_kinds:
            errors.add("rope.scaling.type", f"one of {', '.join(arch.rope_kinds)}", scaling["rope_type"])
        complete_layers(metadata, arch, family, sizes, errors)
    errors.raise_if_any()
    implied = arch.implied_sizes.get(model_type, {})
    for part in {param.requires for param in arch.params} - {"", *implied}:
        params = (param for param in arch.params if param.requires == part)
        sizes[part] = sizes.get(part) is True or all(_is_in_file(param, header) for param in params)
    if "num_parallel_norms" in arch.hf_fields.values():
        # No field of the model, but what follows from one.
        sizes["num_parallel_norms"] = 1 + sizes.pop("has_two_norms")
    sizes["tied"] = any(param.tied_to and param.locations[NAME].name not in header.tensors for param in arch.params)
    try:
        return ModelConfig.from_json(sizes | implied)
    except ConfigError as error:
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")


def find_architecture(metadata: Mapping[str, object], path: Path) -> Architecture:
    """Returns the definition of the network that `general.architecture` names. CheckpointError if there is none."""
    known: dict[str, list[Architecture]] = {}
    for arch in architectures.architectures().values():
        for name in find_names(arch) if arch.gguf_fields else ():
            known.setdefault(name, []).append(arch)
    name = metadata.get(FAMILY)
    if isinstance(name, str) and name in known:
        # Of those that share a name, the one that has experts or windows, or the one that has none.
        return max(
            known[name],
            key=lambda arch: [
                (key in arch.gguf_fields) is bool(metadata.get(f"{name}.{key}")) for key in (EXPERT_COUNT, WINDOW)
            ],
        )
    llama_cpp_names = set(MODEL_ARCH_NAMES.values())
    hint = "Its network differs from these." if isinstance(name, str) and name in llama_cpp_names else ""
    found = "no such key" if name is None else describe_value(name)
    raise CheckpointError(Problem(f"{path}: {FAMILY}", " or ".join(sorted(known)), found, hint))


def find_names(arch: Architecture) -> Mapping[str, str]:
    """Returns {`general.architecture`: `model_type`} of a family's GGUF files."""
    llama_cpp_names = set(MODEL_ARCH_NAMES.values())
    return arch.gguf_network.names or {name: name for name in arch.model_types if name in llama_cpp_names}


def _is_in_file(param: ParamSpec, header: GgufHeader) -> bool:
    return param.locations[NAME].name.format(0) in header.tensors


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
        elif name in MAY_BE_ZERO and key not in arch.gguf_network.required and is_same_value(value, 0):
            continue
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
    metadata: Mapping[str, object], arch: Architecture, family: str, sizes: dict[str, object], errors: ErrorCollector
) -> None:
    """Sets what the file does not state about heads, and checks that keys, values and rotary parts have one size."""
    sizes.setdefault("num_kv_heads", sizes["num_heads"])
    if "head_dim" not in sizes:
        if sizes["hidden_size"] % sizes["num_heads"]:
            expected = f"a divisor of {family}.embedding_length = {sizes['hidden_size']}, or attention.key_length"
            errors.add(f"{family}.attention.head_count", expected, sizes["num_heads"])
            return
        sizes["head_dim"] = sizes["hidden_size"] // sizes["num_heads"]
    head_dim, is_partial = sizes["head_dim"], "rotary_fraction" in arch.hf_fields.values()
    for key in HEAD_SIZES:
        size = metadata.get(f"{family}.{key}", head_dim)
        if key == ROTATED and is_partial and type(size) is int and 0 < size <= head_dim:
            sizes["rotary_fraction"] = size / head_dim
        elif type(size) is not int or size != head_dim:
            errors.add(f"{family}.{key}", f"the head size, {head_dim}", describe_value(size))

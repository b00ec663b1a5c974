"""Reads a model's sizes from Megatron-LM's run arguments, and compares both with another description of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_ligo import arch as architectures
from megatron_ligo.arch import rope_scaling
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import ORIGINAL_LENGTH, attention_factor, scaling_kind
from megatron_ligo.checkpoint.formats.megatron_lm import (
    argument_keys,
    expert_arguments,
    layer_pattern_arguments,
    rope_arguments,
)
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys, check_agreement, is_same_value
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector

ADVICE = "Put the model's Hugging Face config.json next to the weights."
FAMILY_ADVICE = "If the model is of another family, put its Hugging Face config.json next to the weights."
# Arguments that have the value of one field.
SIZES = (
    "num_layers", "encoder_num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "max_position_embeddings", "max_sequence_length", "norm_epsilon", "layernorm_epsilon",
    "share_embeddings_and_output_weights", "add_qkv_bias", "rotary_percent",
)  # fmt: skip
REQUIRED = (
    "num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "vocab_size", "max_positions",
    "norm_eps", "tied", "rope_base",
)  # fmt: skip
# Each must be stated by at least one of its names: another default than a Llama's would leave no tensor.
REQUIRED_FAMILY = (
    ("normalization",),
    ("swiglu", "gated_linear_unit"),
    ("add_bias_linear",),
    ("position_embedding_type", "use_rotary_position_embeddings"),
)
SILU = (None, "torch.nn.functional.silu")
GELU = (None, "torch.nn.functional.gelu", "torch._C._nn.gelu")
# GELU by an approximation with tanh: Megatron's fused kernel, and --openai-gelu.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# Relative. YaRN's factor on cos and sin is stated by another number, from which it follows up to rounding.
SCALING_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RunArguments:
    """The arguments of the run that saved a checkpoint. where: what holds them, for messages.

    is_length_of_training: max_position_embeddings is the length of the run's samples, not the model's.
    """

    values: Mapping[str, object]
    where: str
    is_length_of_training: bool = False


def parse_model_config(arguments: RunArguments, accepted: AcceptedKeys = NO_KEYS) -> ModelConfig:
    """Returns the config that the arguments describe.

    Raises CheckpointError unless its layers are Llama's, or such with experts or norms of each head.
    """
    values = arguments.values
    errors = ErrorCollector(f"no model can be read from {arguments.where}", CheckpointError)
    arch = architectures.get(expert_arguments.find_family(values))
    argument_keys.TABLE.check(values, accepted, errors)
    _check_family(values, arch, None, errors, FAMILY_ADVICE)
    for names in REQUIRED_FAMILY:
        if all(values.get(name) is None for name in names):
            errors.add(" or ".join(names), "a value", "none", ADVICE)
    sizes = parse_sizes(values, arch, None, errors)
    if sizes.get("num_experts"):
        expert_arguments.check_experts(values, accepted, errors)
    if not is_same_value(sizes.pop("rotary_fraction", 1.0), 1.0):
        errors.add("rotary_percent", "1.0", repr(values["rotary_percent"]), FAMILY_ADVICE)
    for field in (*REQUIRED, *(("top_k",) if sizes.get("num_experts") else ())):
        if field not in sizes:
            names = [name for name, read_into in argument_keys.FIELDS.items() if read_into == field]
            errors.add(" or ".join(names), "a value", "none", ADVICE)
    model_type = _choose_model_type(arch, sizes, errors)
    errors.raise_if_any()
    try:
        return ModelConfig.from_json({"arch": arch.name, "model_type": model_type, **sizes})
    except ConfigError as error:
        errors.problems.extend(error.problems)
    errors.raise_if_any()
    raise AssertionError("a refused config states its problems")


def _choose_model_type(arch: Architecture, sizes: Mapping[str, object], errors: ErrorCollector) -> str:
    """Returns the `model_type` of a model of these sizes. Adds an error for what it cannot state."""
    if arch.name == "llama":
        model_type = "qwen2" if sizes.get("qkv_bias") else "mistral" if sizes.get("sliding_window") else "llama"
    else:
        (model_type,) = arch.model_types
        implied = {"qkv_bias": False} | arch.implied_sizes.get(model_type, {})
        for field, value in implied.items():
            if not is_same_value(sizes.get(field, value), value):
                errors.add(field, f"{value}, in {model_type}", repr(sizes[field]), FAMILY_ADVICE)
    if sizes.get("rope_layers") is not None:
        errors.add("no_rope_freq", "rotary positions in every layer", repr(sizes["rope_layers"])[:60], FAMILY_ADVICE)
    if sizes.get("window_layers") is not None and model_type not in arch.hf_pattern_keys:
        found = repr(sizes["window_layers"])[:60]
        errors.add("window_attn_skip_freq", "a window in every layer, or in none", found, FAMILY_ADVICE)
    return model_type


def check_arguments(
    arguments: RunArguments, model_config: ModelConfig, beside: str, accepted: AcceptedKeys = NO_KEYS
) -> None:
    """Raises CheckpointError if the arguments describe another model than a config. beside: what states the config."""
    values, arch = arguments.values, architectures.get(model_config.arch)
    title = f"{arguments.where} and {beside} disagree, or the model is one that this program does not compute"
    errors = ErrorCollector(title, CheckpointError)
    argument_keys.TABLE.check(values, accepted, errors)
    if _is_computed_by_megatron(arch, model_config):
        _check_family(values, arch, model_config, errors)
        _check_activation(values, arch, model_config, errors)
    else:
        for name in _stated_layer_arguments(values):
            expected = f"nothing: Megatron's own models do not compute {model_config.model_type}'s layers"
            errors.add(name, expected, repr(values[name]))
    sizes = parse_sizes(values, arch, model_config, errors)
    if sizes.get("num_experts"):
        expert_arguments.check_experts(values, accepted, errors)
    if arguments.is_length_of_training:
        sizes.pop("max_positions", None)
    if not isinstance(values.get("vocab_size"), int) or not values["vocab_size"]:
        # The padded size bounds the vocabulary, as do the tensors' rows.
        sizes.pop("vocab_size", None)
    if "rope_scaling" in sizes:
        _check_scaling(sizes.pop("rope_scaling"), model_config, beside, errors)
    check_agreement(sizes, model_config.to_json(), arguments.where, beside, errors)
    errors.raise_if_any()


def parse_sizes(
    values: Mapping[str, object], arch: Architecture, beside: ModelConfig | None, errors: ErrorCollector
) -> dict[str, object]:
    """Returns the fields of ModelConfig that arguments state. Adds an error if two of them contradict each other.

    beside: the model that stands beside the arguments, if there is one.
    """
    stated: dict[str, dict[str, object]] = {}
    for name, field, value in _iter_sizes(values):
        stated.setdefault(field, {})[name] = value
    sizes: dict[str, object] = {}
    for field, by_name in stated.items():
        (first, value), *others = by_name.items()
        for name, other in others:
            if not is_same_value(other, value):
                errors.add(name, f"{value!r}, as {first} says", repr(other))
        sizes[field] = value
    hidden, heads = sizes.get("hidden_size"), sizes.get("num_heads")
    if "head_dim" not in sizes and hidden is not None and heads is not None:
        if type(hidden) is int and type(heads) is int and heads > 0:
            sizes["head_dim"] = hidden // heads
        else:
            errors.add("hidden_size, num_attention_heads", "positive integers", f"{hidden!r}, {heads!r}")
    if beside is not None and arch.has_linear_biases(beside):
        # Their query, key and value have biases either way.
        sizes.pop("qkv_bias", None)
    sizes |= expert_arguments.parse_experts(values, errors)
    sizes |= layer_pattern_arguments.parse_patterns(values, sizes.get("num_layers"), arch.is_causal, errors)
    if not arch.has_rotary_positions:
        sizes.pop("rotary_fraction", None)
    elif values.get("rotary_base") is not None or values.get("rope_theta") is not None:
        sizes |= _parse_rope({"rotary_base": values.get("rope_theta"), **values}, errors)
    return sizes


def _parse_rope(values: Mapping[str, object], errors: ErrorCollector) -> dict[str, object]:
    try:
        return rope_arguments.parse_rope_args(values)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        errors.add("rotary_base", "a number", f"{error}")
        return {}


def _iter_sizes(values: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Yields name, field and value of the arguments that are not None."""
    for name in SIZES:
        if values.get(name) is not None:
            yield name, argument_keys.FIELDS[name], values[name]
    if values.get("untie_embeddings_and_output_weights") is not None:
        yield "untie_embeddings_and_output_weights", "tied", not values["untie_embeddings_and_output_weights"]
    vocab_size, padded = values.get("vocab_size"), values.get("padded_vocab_size")
    has_vocab_size = isinstance(vocab_size, int) and vocab_size > 0
    if padded is None or (has_vocab_size and isinstance(padded, int) and vocab_size <= padded):
        padded = vocab_size
    if padded is not None:
        yield "vocab_size", "vocab_size", padded
    yield from _iter_kv_heads(values)


def _iter_kv_heads(values: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Yields the number of key and value heads: that of all heads unless the arguments state groups."""
    names = ("num_key_value_heads", "num_query_groups")
    if values.get("group_query_attention") is False:
        names = ()
    stated = [name for name in names if values.get(name) is not None]
    for name in stated or ["num_attention_heads"]:
        if values.get(name) is not None:
            yield name, "num_kv_heads", values[name]


def _is_computed_by_megatron(arch: Architecture, model_config: ModelConfig) -> bool:
    """Returns whether Megatron-core's GPTModel computes a family: causal, pre-norm, attention before feed-forward."""
    return arch.is_causal and arch.pre_norm and not arch.reads_images and not model_config.parallel_residual


def _stated_layer_arguments(values: Mapping[str, object]) -> list[str]:
    names = (
        "normalization", "swiglu", "gated_linear_unit", "position_embedding_type",
        "apply_residual_connection_post_layernorm",
    )  # fmt: skip
    return [name for name in names if values.get(name) is not None]


def _check_family(
    values: Mapping[str, object],
    arch: Architecture,
    beside: ModelConfig | None,
    errors: ErrorCollector,
    hint: str = "",
) -> None:
    """Adds an error for every argument under which Megatron's layers are not those of a family.

    beside: the model that stands beside the arguments; None = a Llama that they alone describe.
    """
    norm = "RMSNorm" if arch.uses_rms_norm else "LayerNorm"
    is_gated = beside is None or arch.is_gated(beside)
    has_biases = beside is not None and arch.has_linear_biases(beside)
    known: dict[str, tuple[object, ...]] = {
        "normalization": (norm, norm.lower(), None),
        "swiglu": (is_gated, None),
        "gated_linear_unit": (is_gated, None),
        "activation_func": SILU if is_gated else GELU,
        "add_bias_linear": (has_biases, None),
        "qk_layernorm": (arch.normalises_each_head, None),
    }
    if is_gated:
        known["openai_gelu"] = argument_keys.OFF
    if arch.has_learned_positions:
        known["position_embedding_type"] = ("learned_absolute", None)
        known["use_rotary_position_embeddings"] = argument_keys.OFF
    for name, allowed in known.items():
        if name in values and not any(is_same_value(values[name], value) for value in allowed):
            errors.add(name, repr(allowed[0] if allowed[0] is not None else allowed[1]), repr(values[name]), hint)
    if arch.has_rotary_positions:
        _check_rotary(values, errors, hint)
        rope_arguments.check_rope_args(values, errors)


def _check_rotary(values: Mapping[str, object], errors: ErrorCollector, hint: str) -> None:
    """Adds an error if the arguments state two kinds of positions, or rotary ones neither by name nor by type.

    Under --use-rotary-position-embeddings old versions left the type at its default, or had none.
    """
    kind, is_rotary = values.get("position_embedding_type"), values.get("use_rotary_position_embeddings")
    if kind is None and is_rotary is False:
        errors.add("use_rotary_position_embeddings", "True", "False", hint)
    elif is_rotary and kind not in (None, "rope", "learned_absolute"):
        errors.add("position_embedding_type", "'rope', as use_rotary_position_embeddings says", repr(kind))


def _check_scaling(stated: Mapping | None, model_config: ModelConfig, beside: str, errors: ErrorCollector) -> None:
    """Adds an error if the arguments scale the rotary angles in another way than the config."""
    count = len(errors.problems)
    stated = rope_scaling.normalise(stated, model_config.max_positions, model_config.num_rotated // 2, errors)
    if len(errors.problems) > count:
        return
    ours, theirs = _comparable_scaling(stated), _comparable_scaling(model_config.rope_scaling)
    if ours.keys() != theirs.keys() or not all(_is_close(value, theirs[key]) for key, value in ours.items()):
        errors.add("rope_scaling", f"{theirs or None}, as {beside} states", ours or None)


def _comparable_scaling(scaling: Mapping | None) -> dict[str, object]:
    """Returns what a scaling's frequencies depend on, with the defaults that it leaves out; {} for none."""
    if scaling is None:
        return {}
    if scaling_kind(scaling) != "yarn":
        return dict(scaling)
    known = {key: scaling[key] for key in ("rope_type", "factor", ORIGINAL_LENGTH)}
    known["beta_fast"] = scaling.get("beta_fast") or rope_arguments.YARN_DEFAULTS["beta_fast"]
    known["beta_slow"] = scaling.get("beta_slow") or rope_arguments.YARN_DEFAULTS["beta_slow"]
    return {**known, "truncate": scaling.get("truncate", True), "attention_factor": attention_factor(scaling)}


def _is_close(value: object, other: object) -> bool:
    if all(type(number) in (int, float) for number in (value, other)):
        return math.isclose(value, other, rel_tol=SCALING_TOLERANCE)
    return value == other


def _check_activation(
    values: Mapping[str, object], arch: Architecture, model_config: ModelConfig, errors: ErrorCollector
) -> None:
    """Adds an error if the arguments state another form of GELU than the config."""
    fusions = [values[name] for name in ("bias_gelu_fusion", "bias_activation_fusion") if values.get(name) is not None]
    # Transformer Engine's own GELU approximates by tanh too.
    approximations = [values.get(name) for name in ("openai_gelu", "use_te_activation_func")]
    if arch.is_gated(model_config) or not (fusions or any(approximations)):
        return
    uses_tanh = any(approximations) or any(fusions)
    allowed = TANH_GELU if uses_tanh else ("gelu",)
    if model_config.activation not in allowed:
        by_tanh = "GELU by tanh: fused, --openai-gelu or Transformer Engine's"
        stated = by_tanh if uses_tanh else "GELU unfused, by erf"
        errors.add("activation", f"{' or '.join(allowed)}: the run used {stated}", model_config.activation)

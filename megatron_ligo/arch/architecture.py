"""The definition of one model family: its parameters, and its config fields in each checkpoint format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from types import MappingProxyType

from megatron_ligo.arch.ffn_ratio import ffn_ratio_of
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.model_config import ModelConfig, implied_head_sizes
from megatron_ligo.arch.spec import OUTPUT_SCALES, Axis, Heads, ParamSpec, Role, Stage, key_indices, key_pattern
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem


class Task(Enum):
    """Training objective of a family. It determines the samples, the loss, the embeddings and the head."""

    NEXT_TOKEN = "next token"
    MASKED_TOKENS = "masked tokens"
    LABEL = "label"  # image classification; the head's vocabulary is the set of labels


@dataclass(frozen=True)
class Architecture:
    """One model family.

    params: parameters in checkpoint order: before the layers, in a layer, after the layers (the stages are sorted).
    norm: "rms" or "layer". pre_norm: True for norms inside the residual branches (before a block, after it, or both);
        False for post-LN (a norm after each residual sum).
    gain_offset: what the norms add to their stored gains: 1 if they multiply by 1 + w.
    scales_embedding: word embeddings are multiplied by the square root of hidden_size.
    scales_queries: queries are multiplied by a factor of their position (`ModelConfig.query_scaling_beta`).
    scales_unrotated_queries: so are those of layers without rotary positions, where positions count from 1.
    own_head_dim: a config that leaves head_dim out does not mean hidden_size / num_heads.
    head_activation: the activation of a masked-LM head's transform ("" = the layers' activation).
    model_types: Hugging Face `model_type` -> {class: its optional parts (fields of `ModelConfig`)}. The first class is
        assumed if a config names none. The last one is the base model.
    hf_fields, gguf_fields: {config key: field of `ModelConfig`} of the two formats' headers.
    gguf_network: what GGUF files of the family say without a key.
    required_hf_values: values that a Hugging Face config must have (or omit) for this definition to apply.
    rope_kinds: {scaling of rotary positions that the class takes: the one that it takes it for}; {} = all, as stated.
    original_length: the class's own default of original_max_position_embeddings, which wins over a scaling's.
    foreign_hf_keys: `model_type` -> keys of the family's configs that this type's config class does not know.
    hf_pattern_keys: `model_type` -> keys that state which layers have a window, chunks, experts or rotary positions:
        `layer_types`, `no_rope_layers`, `moe_layers`, and those from which transformers derives them.
    fused_experts: {name of a tensor that holds a layer's experts in Hugging Face's files: the roles of its parts}.
    expert_types: `model_type` of a dense model -> the `model_type` of the same network with experts.
    hf_rope_by_layer_type: rotary positions are stated apart for layers with the window and for the others.
    rotates_in_windows_only: in a model with a window, layers without it have no rotary positions.
    needs_window: its class computes another network without one, which is refused.
    hf_window_both_ways: its config states twice the tokens before (and after) each one that a window reaches.
    implied_sizes: `model_type` -> {field: value}, fixed regardless of the config.
    ffn_ratio_key: the config key that states ffn_size as a multiple of hidden_size ("" = it states ffn_size).
    gate_activation: that of an optional gate, whatever the config says.
    antialiases_positions: its class interpolates the positions of larger images with antialiasing.
    coupled_fields: `model_type` -> {field: the one whose value it has}, where one key states both.
    choices: {field: supported values}.
    hf_aliases: {config key: the key in `hf_fields` that transformers also reads under this name}.
    hf_older_forms: pairs of keys and values, and those that state the same network; the first pair that fits is used.
    hf_fixed: config keys that are not written, with the values under which this definition applies.
    hf_harmless: {config key: why it does not change what the model computes}.
    refused_classes: {unsupported class: reason}.

    Per format: ignored_names: fnmatch patterns of stored tensors that are not weights; base_prefixes: the prefix that
    the base model's tensor names lack; renamed_suffixes: {legacy suffix: current suffix}.
    """

    name: str
    params: tuple[ParamSpec, ...]
    norm: str
    model_types: Mapping[str, Mapping[str, tuple[str, ...]]]
    hf_fields: Mapping[str, str]
    pre_norm: bool = True
    gain_offset: float = 0.0
    scales_embedding: bool = False
    scales_queries: bool = False
    scales_unrotated_queries: bool = False
    own_head_dim: bool = False
    task: Task = Task.NEXT_TOKEN
    head_activation: str = ""
    required_hf_values: Mapping[str, object] = field(default_factory=dict)
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    original_length: int | None = None
    foreign_hf_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hf_pattern_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hf_rope_by_layer_type: bool = False
    rotates_in_windows_only: bool = False
    needs_window: bool = False
    gguf_fields: Mapping[str, str] = field(default_factory=dict)
    gguf_network: GgufNetwork = field(default_factory=GgufNetwork)
    refused_classes: Mapping[str, str] = field(default_factory=dict)
    fused_experts: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)
    expert_types: Mapping[str, str] = field(default_factory=dict)
    hf_window_both_ways: bool = False
    implied_sizes: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    ffn_ratio_key: str = ""
    gate_activation: str = ""
    antialiases_positions: bool = False
    coupled_fields: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    choices: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    hf_aliases: Mapping[str, str] = field(default_factory=dict)
    hf_older_forms: tuple[tuple[Mapping[str, object], Mapping[str, object]], ...] = ()
    hf_fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    hf_harmless: Mapping[str, str] = field(default_factory=dict)
    ignored_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    base_prefixes: Mapping[str, str] = field(default_factory=dict)
    renamed_suffixes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A family made of another's may append parameters of its layers.
        order = list(Stage)
        object.__setattr__(self, "params", tuple(sorted(self.params, key=lambda param: order.index(param.stage))))

    # Properties of the family.

    @property
    def is_causal(self) -> bool:
        """True if a token attends to itself and to earlier tokens only."""
        return self.task is Task.NEXT_TOKEN

    @property
    def is_masked_lm(self) -> bool:
        return self.task is Task.MASKED_TOKENS

    @property
    def reads_images(self) -> bool:
        """True if samples are labelled images."""
        return self.task is Task.LABEL

    @property
    def uses_rms_norm(self) -> bool:
        return self.norm == "rms"

    @property
    def has_head_norms(self) -> bool:
        """True if queries and keys are normalised."""
        return self.has(Role.QUERY_NORM)

    def normalises_queries(self, model_config: ModelConfig) -> bool:
        """True if queries and keys of a model are divided by their root mean square, with gains or without."""
        return self.has_head_norms or model_config.l2_normalises_heads

    @property
    def normalises_all_heads(self) -> bool:
        """True if the norm of queries (and of keys) is over all heads together."""
        return self.has_head_norms and self.get(Role.QUERY_NORM).axes[0].heads is Heads.Q

    @property
    def normalises_each_head(self) -> bool:
        """True if there is a norm of each query head and of each key head."""
        return self.has_head_norms and not self.normalises_all_heads

    @property
    def has_output_norms(self) -> bool:
        """True if what a block returns is normalised before the residual sum."""
        return self.has(Role.ATTENTION_OUTPUT_NORM)

    @property
    def starts_unnormalised(self) -> bool:
        """True if the first layer's attention reads the stream as it is, and that of the others a norm of it."""
        norm = self.find(Role.ATTENTION_NORM)
        return norm is not None and norm.skips_first_layer

    @property
    def has_sinks(self) -> bool:
        """True if each query head has a learned logit in the denominator of its softmax."""
        return self.has(Role.ATTENTION_SINK)

    @property
    def has_output_scales(self) -> bool:
        """True if what a block returns is multiplied by a learned number for each feature (layer scale)."""
        return any(map(self.has, OUTPUT_SCALES))

    def is_gated(self, model_config: ModelConfig) -> bool:
        """True if the feed-forward block has a gate (SwiGLU)."""
        gates = (self.find(Role.FFN_GATE), self.find(Role.EXPERT_GATE))
        return any(gate is not None and gate.exists(model_config) for gate in gates)

    @property
    def has_experts(self) -> bool:
        """True if a router chooses each token's feed-forward experts."""
        return self.has(Role.ROUTER)

    def has_bias(self, role: Role, model_config: ModelConfig) -> bool:
        """True if the module of a role has a bias in a model."""
        params = (param for param in self.params if param.role is role and param.is_bias)
        return any(param.exists(model_config) for param in params)

    def has_norm_biases(self, model_config: ModelConfig) -> bool:
        """True if the norms of a model add a bias."""
        return any(self.has_bias(role, model_config) for role in (Role.ATTENTION_NORM, Role.FFN_NORM))

    def shares_norm(self, model_config: ModelConfig) -> bool:
        """True if attention and feed-forward read one norm of the layer's input."""
        norms = (param for param in self.params if param.role is Role.FFN_NORM)
        return model_config.parallel_residual and not any(param.exists(model_config) for param in norms)

    def has_linear_biases(self, model_config: ModelConfig) -> bool:
        """True if the output projections of attention and feed-forward have biases."""
        return self.has_bias(Role.ATTENTION_OUTPUT, model_config)

    @property
    def has_learned_positions(self) -> bool:
        """True if positions are a table of parameters."""
        return self.has(Role.POSITION_EMBEDDING)

    @property
    def has_rotary_positions(self) -> bool:
        return "rope_base" in self.hf_fields.values()

    def embedding_multiplier(self, model_config: ModelConfig) -> float:
        """Returns the factor of the word embeddings of a model."""
        return model_config.hidden_size**0.5 if self.scales_embedding else model_config.embedding_multiplier

    # Parameters.

    def find(self, role: Role, bias: bool = False) -> ParamSpec | None:
        """Returns the weight (or bias) of a role; None if the family has none. Excludes `unread` tensors."""
        return self._params_by_role.get((role, bias))

    def get(self, role: Role, bias: bool = False) -> ParamSpec:
        """Returns the weight (or bias) of a role. KeyError if the family has none."""
        return self._params_by_role[role, bias]

    def has(self, role: Role, bias: bool = False) -> bool:
        """True if the family defines a weight (or bias) of a role. A model may lack it if it is optional."""
        return (role, bias) in self._params_by_role

    def param(self, key: str) -> ParamSpec:
        """Returns the parameter of a key such as `layers.3.q`, or of its pattern `layers.{}.q`."""
        return self.params_by_key[key_pattern(key)]

    @cached_property
    def params_by_key(self) -> Mapping[str, ParamSpec]:
        return MappingProxyType({param.key: param for param in self.params})

    @cached_property
    def _params_by_role(self) -> Mapping[tuple[Role, bool], ParamSpec]:
        return MappingProxyType({(param.role, param.is_bias): param for param in self.params if not param.unread})

    def layer_params(self, model_config: ModelConfig, layer: int | None = None) -> list[ParamSpec]:
        """Returns the parameters of one layer, or of any layer."""
        params = [param for param in self.params if param.in_layer and param.exists(model_config)]
        return [param for param in params if layer != 0 or not param.skips_first_layer]

    def params_outside_layers(self, model_config: ModelConfig) -> tuple[list[ParamSpec], list[ParamSpec]]:
        """Returns the stored parameters before and after the layers that the training loss depends on."""
        params = [param for param in self.params if param.is_stored(model_config) and param.reaches_loss]
        first, last = ([param for param in params if param.stage is stage] for stage in (Stage.FIRST, Stage.LAST))
        return first, last

    def keys(self, model_config: ModelConfig) -> Iterator[str]:
        """Yields every stored key in file order: before the layers, layer by layer, after the layers."""
        stored = [param for param in self.params if param.is_stored(model_config)]
        yield from (param.key for param in stored if param.stage is Stage.FIRST)
        shared = [param for param in stored if param.in_layer and not param.in_expert]
        of_experts = [param for param in stored if param.in_expert]
        for layer in range(model_config.num_layers):
            yield from (param.key.format(layer) for param in shared if layer or not param.skips_first_layer)
            for expert in range(model_config.num_experts):
                yield from (param.key.format(layer, expert) for param in of_experts)
        yield from (param.key for param in stored if param.stage is Stage.LAST)

    # Spaces.

    def space(self, axis: Axis, model_config: ModelConfig) -> str:
        """Returns the space of an axis. Tied embeddings merge the spaces of the tied tensors' axes."""
        return self._merged_spaces.get(axis.space, axis.space) if model_config.tied else axis.space

    def spaces(self, model_config: ModelConfig) -> set[str]:
        """Returns the spaces of a model."""
        existing = (param for param in self.params if param.exists(model_config))
        return {self.space(axis, model_config) for param in existing for axis in param.axes}

    @cached_property
    def _merged_spaces(self) -> Mapping[str, str]:
        tied = [(param, self.params_by_key[param.tied_to]) for param in self.params if param.tied_to]
        pairs = [pair for own, other in tied for pair in zip(own.axes, other.axes, strict=True)]
        return {own.space: other.space for own, other in pairs if own.space != other.space}

    # Names and values of the formats.

    def optional_parts(self, model_type: str) -> set[str]:
        """Returns the `ModelConfig` fields that state which optional parts a model of this type has."""
        return {part for parts in self.hf_classes(model_type).values() for part in parts}

    def hf_classes(self, model_type: str) -> Mapping[str, tuple[str, ...]]:
        """Returns the Hugging Face classes of a model type, with their optional parts. ConfigError if it is unknown."""
        if model_type not in self.model_types:
            raise ConfigError(Problem("model_type", f"one of {', '.join(self.model_types)}", repr(model_type)[:60]))
        return self.model_types[model_type]

    def hf_class(self, model_config: ModelConfig) -> str:
        """Returns the Hugging Face class of a model: the first whose parts the model has, otherwise the last."""
        classes = self.hf_classes(model_config.model_type)
        fitting = [name for name, parts in classes.items() if all(getattr(model_config, part) for part in parts)]
        return fitting[0] if fitting else list(classes)[-1]

    def stored_name(self, key: str, model_config: ModelConfig, format_name: str) -> str:
        """Returns the name of the tensor that holds a key in a format."""
        location = self.param(key).locations[format_name]
        name = location.tied_name if location.tied_name and model_config.tied else location.name
        name = name.format(*key_indices(key))
        is_bare = self.hf_class(model_config) == list(self.hf_classes(model_config.model_type))[-1]
        return name.removeprefix(self.base_prefixes.get(format_name, "")) if is_bare else name

    def check(self, model_config: ModelConfig, errors: ErrorCollector) -> None:
        """Adds an error for each size that the family's config cannot state and that differs from its implied value."""
        if self.has_experts != bool(model_config.num_experts):
            expected = "a positive number" if self.has_experts else "none in this family"
            errors.add("num_experts", expected, model_config.num_experts)
        for name, other in self.coupled_fields.get(model_config.model_type, {}).items():
            if getattr(model_config, name) != getattr(model_config, other):
                expected = f"{getattr(model_config, other)}, as {other} ({self.name} states both by one key)"
                errors.add(name, expected, getattr(model_config, name))
        implied = implied_head_sizes(model_config.hidden_size, model_config.num_heads)
        if self.ffn_ratio_key:
            if ffn_ratio_of(model_config) is None:
                hint = f"{self.ffn_ratio_key} states it; with a gate, two thirds of it, rounded up to a multiple of 8."
                expected = f"a whole multiple of hidden_size = {model_config.hidden_size}"
                errors.add("ffn_size", expected, model_config.ffn_size, hint)
            del implied["ffn_size"]
        for name, value in implied.items():
            if name not in self.hf_fields.values() and getattr(model_config, name) != value:
                where = f"{name} ({self.name}, {model_config.hidden_size} features, {model_config.num_heads} heads)"
                errors.add(where, value, getattr(model_config, name), "This family's config cannot state another.")

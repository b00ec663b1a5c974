"""The layers of a factored model: Megatron-core's, with linears and norms computed from maps and mixed small weights.

No grown matrix or its gradient is materialised (factored_linears.py). Legend: s tokens, b batch, D2 large hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ligo.arch.spec import OUTPUT_SCALES, ParamSpec, Role, Use
from megatron_ligo.growth.experts import absent_block
from megatron_ligo.growth.operator import Operator
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_experts import FactoredExperts
from megatron_ligo.models.factored.factored_linears import (
    ActivationTransform,
    ColumnParallelFactors,
    FactoredModule,
    FactoredNorm,
    FactoredScale,
    InputTransform,
    ModulePlaceholder,
    NormTransform,
    RowParallelFactors,
    pass_through,
)
from megatron_ligo.models.factored.factored_sinks import FactoredSinks
from megatron_ligo.models.factored.map_parameters import DepthParameters, MapParameters, RouterParameters
from megatron_ligo.models.factored.step_cache import StepCache
from megatron_ligo.models.factored.step_state import StepState
from megatron_ligo.models.mcore.layer_calls import call_layer, checkpointed
from megatron_ligo.models.mcore.layer_spec import (
    BuildOptions,
    build_layer_spec,
    build_transformer_config,
    get_ffn_activation,
    get_layer_class,
    get_mlp_submodules,
)
from megatron_ligo.models.mcore.rotary import unscale_window_positions

# In pre-norm layers, the linear that reads each norm, by Megatron-core's names.
NORM_READERS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
ACTIVATION_READERS = ("mlp.linear_fc2", "mlp.shared_experts.linear_fc2")
EXPERTS = "mlp"  # of a layer with experts


class SharedMaps(nn.Module):
    """First layer of each stage: publishes the shared maps to the step state and returns its input."""

    def __init__(self, context: FactoredContext, state: StepState):
        super().__init__()
        self.context = context
        self.state = state
        self.maps = MapParameters(context.operator, context.mesh, None, context.sequence_parallel)
        self.cache = StepCache()

    def forward(self, x: Tensor) -> Tensor:
        """Returns its input unchanged: tokens or activations of any shape."""
        state, layout = self.state, self.maps.layout
        version = state.version(self.training)
        if self.cache.needs_rebuild(version):
            tensors = self.maps(state.dtype)
            self.cache.mark_built(version, tensors)
            state.start_step(layout.matrices(tensors))
        if self.context.gradients_each:
            state.start_micro_batch(layout, self.maps(state.dtype))
        else:
            state.start_micro_batch(layout, self.cache.take(self.context.micro_batches))
        return x


class FactoredLayer(nn.Module):
    """A large layer. Its parameters are its depth maps and its own width maps."""

    def __init__(self, context: FactoredContext, state: StepState, layer: int):
        super().__init__()
        self.context = context
        self.state = state
        self.layer = layer
        self.cache = StepCache()
        operator, source = context.operator, context.source
        self.maps = MapParameters(operator, context.mesh, layer, context.sequence_parallel)
        self.depth = DepthParameters(operator, layer, source.split_specs, source.whole_specs)
        self.router = None
        if operator.draws_routers:
            self.router = RouterParameters(operator, context.mesh, layer, context.sequence_parallel)
        mesh, aux_loss = context.mesh, context.router_aux_loss
        build = BuildOptions(context.dtype, mesh.tp, context.sequence_parallel, aux_loss, mesh.ep)
        config = build_transformer_config(operator.large, build)
        # fc2 applies the activation as its input transform, so Megatron-core's MLP must not.
        config.gated_linear_unit, config.activation_func = False, pass_through
        # Sinks are grown, too.
        config.softmax_type = "vanilla"
        submodules = build_layer_spec_with_placeholders(operator).submodules
        self.block = get_layer_class(operator.large)(config, submodules, layer_number=layer + 1)
        unscale_window_positions([self.block], operator.large)
        modules = build_modules(context, layer, config)
        for path, module in modules.items():
            if isinstance(module, FactoredSinks):
                module.attention = self.block.get_submodule(path)
            self.block.set_submodule(path, module)
        self.factored_modules = list(modules.values())
        self._tensor_counts: list[int] = []
        # The layers of this process, which may build their tensors together.
        self.siblings: Sequence[FactoredLayer] = ()

    def forward(self, h: Tensor) -> Tensor:
        """h (s or s / tp, b, D2) -> the same shape, in the step state's dtype."""
        state = self.state
        version = state.version(self.training)
        if self.cache.needs_rebuild(version):
            self.cache.mark_built(version, self._build())
        tensors = self.cache.take(self.context.micro_batches)
        if self.context.recompute and torch.is_grad_enabled():
            return checkpointed(self._run, h, *state.map_tensors, *tensors)
        return self._run(h, *state.map_tensors, *tensors)

    def _build(self) -> list[Tensor]:
        """Builds the tensors of a step: the layer's own maps, then each module's tensors, in order."""
        state = self.state
        if self.context.builds_alike:
            return state.mixer.take_built(self.layer, state.dtype, self._build_layers)
        tensors = self.maps(state.dtype)
        maps = state.step_maps | self.maps.layout.matrices(tensors)
        mixed = state.mixer.take(self.layer, state.dtype)
        if self.router is not None:
            mixed = mixed | {self.context.operator.arch.get(Role.ROUTER).key: self.router()}
        self._tensor_counts = []
        for module in self.factored_modules:
            built = module.build(mixed, maps, state.dtype)
            self._tensor_counts.append(len(built))
            tensors += built
        return tensors

    def _build_layers(self, mixed: dict[str, Tensor]) -> list[Tensor]:
        """Builds stacks of the tensors of several layers, this one first, from stacks (layers, ...) of mixed ones."""
        built = [module.build(mixed, self.state.step_maps, self.state.dtype) for module in self.factored_modules]
        self._tensor_counts = list(map(len, built))
        for layer in self.siblings:
            layer.adopt_build(self)
        return [tensor for tensors in built for tensor in tensors]

    def adopt_build(self, other: FactoredLayer) -> None:
        """Takes over what another layer has noted of its build, which is the same in all layers."""
        self._tensor_counts = other._tensor_counts
        for module, built in zip(self.factored_modules, other.factored_modules, strict=True):
            module.adopt_build(built)

    def _run(self, h: Tensor, *tensors: Tensor) -> Tensor:
        """Runs the layer on the shared maps' tensors and those of `_build`, in this order."""
        maps, rest = {}, list(tensors)
        for layout in (self.state.map_layout, self.maps.layout):
            maps |= layout.matrices(rest[: layout.num_tensors])
            rest = rest[layout.num_tensors :]
        for module, count in zip(self.factored_modules, self._tensor_counts, strict=True):
            module.bind(rest[:count], maps)
            rest = rest[count:]
        try:
            return call_layer(self.block, h, self.context.rotary_positions(h, self.layer))
        finally:
            for module in self.factored_modules:
                module.unbind()


def build_modules(context: FactoredContext, layer: int, config: TransformerConfig) -> dict[str, FactoredModule]:
    """Builds the modules of a layer's parameters, by their path in Megatron-core's layer, in the family's order.

    Each linear has the norm or activation before it as its input transform. Norms after a block, and of heads, are
    separate modules.
    """
    operator = context.operator
    specs_by_path: dict[str, list[ParamSpec]] = {}
    absent = absent_block(operator.small, operator.settings)
    for spec in operator.arch.layer_params(operator.large, layer):
        if spec.role in absent:
            continue
        path = spec.locations["mcore"].name.partition("layers.{}.")[2].rpartition(".")[0]
        specs_by_path.setdefault(path, []).append(spec)
    norms = {
        path: NormTransform(context, specs, layer, config.layernorm_epsilon, config.normalization)
        for path, specs in specs_by_path.items()
        if any(spec.axes[0].use is Use.GAIN for spec in specs) and specs[0].role not in OUTPUT_SCALES
    }
    activation = ActivationTransform(get_ffn_activation(operator.large))
    transforms: dict[str, InputTransform] = dict.fromkeys(ACTIVATION_READERS, activation)
    expert_specs = [spec for path in list(specs_by_path) if is_expert_path(path) for spec in specs_by_path.pop(path)]
    if operator.arch.has_experts:
        # The router reads the second norm too.
        transforms["self_attention.linear_qkv"] = norms.pop("input_layernorm")
    elif operator.arch.pre_norm:
        readers = dict(NORM_READERS)
        if operator.arch.shares_norm(operator.large):
            readers["mlp.linear_fc1"] = "input_layernorm"
        transforms |= {reader: norms[norm] for reader, norm in readers.items() if norm in norms}
        norms = {path: norm for path, norm in norms.items() if path not in readers.values()}
    modules: dict[str, FactoredModule] = {}
    if expert_specs:
        modules[EXPERTS] = FactoredExperts(context, expert_specs, layer, config)
    for path, specs in specs_by_path.items():
        if path in norms:
            modules[path] = FactoredNorm(norms[path])
        elif specs[0].role in OUTPUT_SCALES:
            modules[path] = FactoredScale(context, specs, layer)
        elif specs[0].role is Role.ATTENTION_SINK:
            modules[path] = FactoredSinks(context, specs, layer)
        elif path not in NORM_READERS.values():
            kind = ColumnParallelFactors if specs[0].tp_dim == 0 else RowParallelFactors
            modules[path] = kind(context, specs, layer, transforms.get(path))
    return modules


def is_expert_path(path: str) -> bool:
    """True for the module of a router, of an expert's linear or of a shared expert's weight."""
    return path in (f"{EXPERTS}.router", f"{EXPERTS}.shared_experts") or path.startswith(f"{EXPERTS}.experts.")


def build_layer_spec_with_placeholders(operator: Operator) -> ModuleSpec:
    """Builds the layer spec with a `ModulePlaceholder` in place of every module with parameters."""
    # A fit is evaluated in fp32, in which Transformer Engine's attention keeps all attention weights in memory.
    spec = build_layer_spec(operator.large, torch.float32)
    attention = spec.submodules.self_attention.submodules
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = ModulePlaceholder
    attention.linear_qkv = attention.linear_proj = ModulePlaceholder
    if operator.arch.has_head_norms:
        attention.q_layernorm = attention.k_layernorm = ModulePlaceholder
    if operator.arch.has_output_norms:
        spec.submodules.post_self_attn_layernorm = spec.submodules.post_mlp_layernorm = ModulePlaceholder
    if operator.arch.has_output_scales:
        spec.submodules.post_self_attn_scale = spec.submodules.post_mlp_scale = ModulePlaceholder
    if operator.arch.has_experts:
        spec.submodules.mlp = ModulePlaceholder
    else:
        mlp = get_mlp_submodules(spec)
        mlp.linear_fc1 = mlp.linear_fc2 = ModulePlaceholder
    return spec

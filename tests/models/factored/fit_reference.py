"""The fit in one process of plain torch: the reference for every sharded run.

Independent of models/: a Hugging Face model runs on weights that reference_growth.py makes of the operator's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import expert_index
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.mixture_reader import as_mixture_reader
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator
from tests import layer_norm_models
from tests.layer_norm_models import memory_of
from tests.models.factored.reference_growth import materialise


def make_operator(small, large: dict, settings: dict) -> Operator:
    return build_initial_operator(small, LargeSection(**large), OperatorSection(**settings))


AUX_LOSS = 0.3  # of routers


def source_of(small, operator: Operator):
    """The small model's tensors; a dense one's as a mixture of one expert, if experts grow from it."""
    source = memory_of(layer_norm_models.model_of(small), small)
    return as_mixture_reader(source, operator.settings.expert_start) if operator.large.num_experts else source


def loss_of(operator: Operator, grown: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of a Hugging Face model with the grown weights."""
    return losses_of(operator, grown, batch)[0]


def losses_of(operator: Operator, grown: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of a Hugging Face model with the grown weights, and the weighted aux loss of its routers."""
    tokens, labels = batch
    model = layer_norm_models.model_of(operator.large)
    if operator.large.num_experts:
        output = torch.func.functional_call(
            model, mixture_state(operator, grown), (tokens,), {"output_router_logits": True}
        )
        aux = load_balancing_loss(output.router_logits, tokens.shape, operator.large.top_k)
    else:
        state = layer_norm_models.in_memory(model, layer_norm_models.state_of(operator.arch, operator.large, grown))
        output, aux = torch.func.functional_call(model, state, (tokens,)), torch.zeros(())
    return torch.nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten()), AUX_LOSS * aux


def load_balancing_loss(router_logits, shape: torch.Size, top_k: int) -> Tensor:
    """Switch Transformer's loss (equation 4) of each sequence, over the layers' routers."""
    total = torch.zeros(())
    for logits in router_logits:
        scores = logits.float().softmax(-1).reshape(*shape, -1)
        chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)
        total = total + scores.shape[-1] * (chosen.mean(1) / top_k * scores.mean(1)).sum(-1).mean()
    return total


def mixture_state(operator: Operator, grown: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names in memory: one tensor for the experts of a layer."""
    large, state = operator.large, {}
    for key, tensor in grown.items():
        if expert_index(key) is None and not key.endswith(".router"):
            state |= layer_norm_models.state_of_key(operator.arch, large, key, tensor)
    for layer in range(large.num_layers):
        parts = [
            torch.stack([grown[f"layers.{layer}.experts.{expert}.{part}"] for expert in range(large.num_experts)])
            for part in ("gate", "up", "down")
        ]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat(parts[:2], dim=1)
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = parts[2]
        state[f"model.layers.{layer}.mlp.gate.weight"] = grown[f"layers.{layer}.router"]
    return state


def lag_of(operator: Operator) -> dict[str, Tensor]:
    """What a training might have added to each weight of the large model, by canonical key."""
    arch, large = operator.arch, operator.large
    drawn = torch.Generator().manual_seed(5)
    return {key: 0.02 * torch.randn(arch.param(key).shape(large), generator=drawn) for key in arch.keys(large)}


def run(
    small,
    large: dict,
    settings: dict,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: str,
    lr: float,
    clip: float,
    lagged: bool = False,
):
    """(losses, gradient norms, operator, grown weights) of plain torch training on the whole batches; lagged: the
    losses are those of the grown weights and `lag_of`."""
    operator = make_operator(small, large, settings)
    source = source_of(small, operator)
    fixed = {name: operator.tensor(name).clone() for name in operator.shapes()}
    learned = {}
    for name, tensor in fixed.items():
        learned |= parameters(operator, name, tensor)
    kind = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        "sgd": lambda p: torch.optim.SGD(p, lr=lr),
    }
    stepper = kind[optimizer](list(learned.values()))

    def values() -> dict[str, Tensor]:
        return {name: learned.get(name, tensor) + low_rank(learned, name) for name, tensor in fixed.items()}

    losses, norms, lag = [], [], lag_of(operator) if lagged else {}
    for batch in batches:
        grown = {key: tensor + lag.get(key, 0) for key, tensor in materialise(operator, source, values()).items()}
        loss, aux = losses_of(operator, grown, batch)
        stepper.zero_grad()
        (loss + aux).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learned.values(), clip)))
        stepper.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, norms, values(), materialise(operator, source, values())


def parameters(operator: Operator, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is learned of one of the operator's tensors: all of it, the factors of a change to it, or nothing."""
    kind, map_name, *_ = name.split(".")
    rank = operator.rank(map_name) if kind == "width" else 0
    if rank:
        v = operator.right_factor(name, rank)
        large = max(tensor.shape)
        return {f"{name}.u": torch.zeros(large, rank, requires_grad=True), f"{name}.v": v.requires_grad_()}
    return {} if kind == "gain" else {name: tensor.requires_grad_()}


def low_rank(learned: dict[str, Tensor], name: str) -> Tensor | int:
    if f"{name}.u" not in learned:
        return 0
    change = learned[f"{name}.u"] @ learned[f"{name}.v"]
    return change.t() if name.endswith("contract") else change

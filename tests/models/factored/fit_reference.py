"""The fit in one process of plain torch: the reference for every sharded run.

Independent of models/: a Hugging Face model runs on weights that reference_growth.py makes of the operator's tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator
from tests import layer_norm_models
from tests.layer_norm_models import memory_of
from tests.models.factored.reference_growth import materialise


def make_operator(small, large: dict, settings: dict) -> Operator:
    return build_initial_operator(small, LargeSection(**large), OperatorSection(**settings))


def loss_of(operator: Operator, grown: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of a Hugging Face model with the grown weights."""
    tokens, labels = batch
    model = layer_norm_models.model_of(operator.large)
    state = layer_norm_models.in_memory(model, layer_norm_models.state_of(operator.arch, operator.large, grown))
    logits = torch.func.functional_call(model, state, (tokens,)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


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
    source = memory_of(layer_norm_models.model_of(small), small)
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
        loss = loss_of(operator, grown, batch)
        stepper.zero_grad()
        loss.backward()
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

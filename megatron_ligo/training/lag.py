"""The lag of a fit: what some training has added to the grown start, held still while the maps move.

The loss at once says little of the loss that training will reach from a start. With `fit.lag` the model that is fitted
is grown(maps) + D, where D = trained - start: the loss is that of the start after the training that led from `start` to
`trained`. D is taken to stay what it is while the start moves a little, which is first-order MAML (arXiv 1703.03400,
1803.02999) with one training for all steps of the fit. What is written is the operator alone: training begins again
from its start.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo import formats
from megatron_ligo.arch.rows import Task, layer_of
from megatron_ligo.errors import Faults
from megatron_ligo.formats.base import Reader
from megatron_ligo.grow import Grown
from megatron_ligo.growth.operator import Operator

FAR = 0.5  # of the weights' norm: training that short does not lead as far, another start lies beyond


class Lag:
    """D, read one tensor at a time. trained: a checkpoint of the large model; small: what `operator` grows."""

    def __init__(self, trained: Reader, operator: Operator, small: Reader):
        self.trained = trained
        self.start = Grown(operator, small)

    def __call__(self, key: str) -> Tensor:
        """D of a canonical key, in fp32."""
        return self.trained.read(key).float() - self.start.read(key).float()


def open_lag(path: str, operator: Operator, small: Reader, faults: Faults) -> Lag | None:
    """The lag that a checkpoint ends; None, with faults, where it is no training of this start."""
    arch = architectures.get(operator.large.arch)
    if arch.task is not Task.NEXT_TOKEN:
        faults.add("fit.lag", "a decoder", operator.large.arch, "Leave it out: fit on the loss at once.")
        return None
    trained = formats.open(path)
    expected, found = operator.large.to_json(), trained.dims.to_json()
    differ = [name for name in expected if found[name] != expected[name]]
    for name in differ:
        faults.add(f"fit.lag: {path}: {name}", expected[name], found[name], "Train the start of this very fit.")
    if differ:
        return None
    lag = Lag(trained, operator, small)
    part = _part(lag, [key for key in arch.keys(operator.large) if layer_of(key) in (None, 0)])
    if part > FAR:
        expected = f"a training of this start, at most {FAR} of the weights' norm away from it"
        faults.add(f"fit.lag: {path}", expected, f"{part:.2f}", "Give [operator] of the start that was trained.")
    return lag


def _part(lag: Lag, keys: Iterable[str]) -> float:
    """The norm of D over that of what was trained."""
    pairs = [(lag(key).norm() ** 2, lag.trained.read(key).float().norm() ** 2) for key in keys]
    return float((sum(added for added, _ in pairs) / sum(whole for _, whole in pairs)) ** 0.5)

"""The lag of a fit: what some training has added to the grown start, held still while the maps move.

The loss at once says little of the loss that training will reach from a start. With `fit.lag` the model that is fitted
is grown(maps) + D, where D = trained - start: the loss is that of the start after the training that led from `start` to
`trained`. D is taken to stay what it is while the start moves a little, which is first-order MAML (arXiv 1703.03400,
1803.02999) with one training for all steps of the fit. What is written is the operator alone: training begins again
from its start.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Task
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.export.grown_reader import GrownReader, digest_operator, digest_weights
from megatron_ligo.growth.operator import Operator
from megatron_ligo.training.checkpointing import run_checkpoints

log = logging.getLogger(__name__)

SAME_START_HINT = "Give [small] and [operator] of the start that was trained."
# Of the weights' norm: no short training leads as far, so another start lies between.
MAX_DISTANCE = 0.5


class Lag:
    """D, read one tensor at a time. trained: a checkpoint of the large model; small: what `operator` grows."""

    def __init__(self, trained: Reader, operator: Operator, small: Reader):
        self.trained = trained
        self.start = GrownReader(operator, small)

    def __call__(self, key: str) -> Tensor:
        """D of a canonical key, in fp32."""
        return self.trained.read(key).float() - self.start.read(key).float()

    def relative_norm(self) -> float:
        """The norm of D over that of what was trained."""
        added, whole = 0.0, 0.0
        for key in self.trained.keys():  # noqa: SIM118
            added += float(self(key).norm()) ** 2
            whole += float(self.trained.read(key).float().norm()) ** 2
        return (added / whole) ** 0.5


def check_is_decoder(operator: Operator, errors: ErrorCollector) -> None:
    if architectures.get(operator.large.arch).task is not Task.NEXT_TOKEN:
        errors.add("fit.lag", "a decoder", operator.large.arch, "Leave it out: fit on the loss at once.")


def open_lag(path: str, operator: Operator, small: Reader, errors: ErrorCollector) -> Lag | None:
    """The lag that a checkpoint ends; None, with faults, where it is no training of this start.

    A checkpoint of a run of ours says which start it was trained from. Of any other the distance must do.
    """
    before = len(errors.problems)
    check_is_decoder(operator, errors)
    if len(errors.problems) > before:
        return None
    trained = formats.open(path)
    expected, found = operator.large.to_json(), trained.model_config.to_json()
    for name, size in expected.items():
        if found[name] != size:
            errors.add(f"fit.lag: {path}: {name}", size, found[name], "Train the start of this very fit.")
    if len(errors.problems) > before:
        return None
    lag, origin = Lag(trained, operator, small), run_checkpoints.read_state(Path(path)).get("origin")
    if origin is None:
        _check_distance(lag, path, errors)
    else:
        _check_origin(origin, operator, small, path, errors)
    return lag


def _check_origin(origin: dict, operator: Operator, small: Reader, path: str, errors: ErrorCollector) -> None:
    settings = json.loads(json.dumps(vars(operator.settings)))
    stated, ours = origin["operator"], {"digest": digest_operator(operator), "settings": settings}
    if stated["digest"] != ours["digest"] or stated["settings"] != ours["settings"]:
        differ = [name for name, value in settings.items() if stated["settings"].get(name) != value]
        errors.add(
            f"fit.lag: {path}",
            "a training of this start",
            f"of another operator ({', '.join(differ)})",
            SAME_START_HINT,
        )
    digest = digest_weights(small)
    if origin["source"]["digest"] != digest:
        errors.add(
            f"fit.lag: {path}", f"a training of this small model, {digest}", origin["source"]["digest"], SAME_START_HINT
        )


def _check_distance(lag: Lag, path: str, errors: ErrorCollector) -> None:
    part = lag.relative_norm()
    log.warning("fit.lag: %s does not say which start it was trained from; it is %.2f of its norm away", path, part)
    if not part <= MAX_DISTANCE:
        expected = f"a training of this start, at most {MAX_DISTANCE} of the weights' norm away from it"
        errors.add(f"fit.lag: {path}", expected, f"{part:.2f}", SAME_START_HINT)

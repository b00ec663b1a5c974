"""The lag of a fit: the change that a training run has made to the grown start, held fixed while the maps are fitted.

The loss of a start says little about the loss that training will reach from it. With `fit.lag` the fitted model is
grown(maps) + D, where D = trained - start: its loss is that of the start after the training that led from `start` to
`trained`. D is assumed constant for small changes of the start, which is first-order MAML (arXiv 1703.03400,
1803.02999) with one training run for all steps of the fit. Only the operator is written: pretraining begins at step 0
from the start that it grows.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.content import read_weights_digest
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.export.grown_reader import GrownReader, digest_operator
from megatron_ligo.growth.operator import Operator
from megatron_ligo.training.checkpointing import run_checkpoints

log = logging.getLogger(__name__)

SAME_START_HINT = "Give [small] and [operator] of the start that was trained."
# Relative to the norm of the weights. No short training moves them that far: the start must be another one.
MAX_DISTANCE = 0.5


class Lag:
    """Reads D one tensor at a time. trained: checkpoint of the large model; small: the model that `operator` grows."""

    def __init__(self, trained: Reader, operator: Operator, small: Reader):
        self.trained = trained
        self.start = GrownReader(operator, small)

    def __call__(self, key: str) -> Tensor:
        """Returns D of a canonical key: fp32, in the shape of the large model's tensor."""
        return self.trained.read(key).float() - self.start.read(key).float()

    def relative_norm(self) -> float:
        """Returns the norm of D relative to the norm of the trained weights."""
        change, total = 0.0, 0.0
        for key in self.trained.keys():  # noqa: SIM118
            change += float(self(key).norm()) ** 2
            total += float(self.trained.read(key).float().norm()) ** 2
        return (change / total) ** 0.5


def check_is_decoder(operator: Operator, errors: ErrorCollector) -> None:
    """Adds an error if the model is not a decoder."""
    if not architectures.get(operator.large.arch).is_causal:
        errors.add("fit.lag", "a decoder", operator.large.arch, "Leave it out: fit on the loss at once.")


def open_lag(path: str, operator: Operator, small: Reader, errors: ErrorCollector) -> Lag | None:
    """Opens the lag that ends at the checkpoint `path`; adds errors if it was not trained from this start.

    Returns None if the architecture or a size is wrong. A run's checkpoint names the start that it was trained from;
    any other checkpoint is judged by its distance from the start.
    """
    before = len(errors.problems)
    check_is_decoder(operator, errors)
    if len(errors.problems) > before:
        return None
    trained = formats.open(path)
    expected, found = operator.large.to_json(), trained.model_config.to_json()
    for name, size in expected.items():
        if found[name] != size:
            errors.add(f"fit.lag: {path}: {name}", size, found[name], "Train the start of this fit.")
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
    stated = origin["operator"]
    if stated["digest"] != digest_operator(operator) or stated["settings"] != settings:
        differing = [name for name, value in settings.items() if stated["settings"].get(name) != value]
        errors.add(
            f"fit.lag: {path}",
            "a training of this start",
            f"of another operator ({', '.join(differing)})",
            SAME_START_HINT,
        )
    digest = read_weights_digest(small)
    if origin["source"]["digest"] != digest:
        errors.add(
            f"fit.lag: {path}", f"a training of this small model, {digest}", origin["source"]["digest"], SAME_START_HINT
        )


def _check_distance(lag: Lag, path: str, errors: ErrorCollector) -> None:
    distance = lag.relative_norm()
    log.warning("fit.lag: %s does not say which start it was trained from; it is %.2f of its norm away", path, distance)
    if not distance <= MAX_DISTANCE:
        expected = f"a training of this start, at most {MAX_DISTANCE} of the weights' norm away from it"
        errors.add(f"fit.lag: {path}", expected, f"{distance:.2f}", SAME_START_HINT)

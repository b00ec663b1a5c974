"""Growth as a Reader: a large checkpoint whose tensors are computed, one at a time, from a small one.

Whatever writes a checkpoint (convert.py, any format) writes a grown one, and nothing holds it whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Use, axis_size
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.growth import random_init
from megatron_ligo.growth.adam_state import DualMaps
from megatron_ligo.growth.operator import Operator


class GrownReader(Reader):
    """operator applied to source; fp32 (fp64 where the source is fp64).

    moments: "reset" (none), "grow" or "old" (growth/adam_state.py); the source must have some then.
    """

    format = "grown"
    path = None

    def __init__(self, operator: Operator, source: Reader, moments: str = "reset"):
        check_source(operator, source)
        if moments != "reset" and not source.has_moments:
            hint = "Say handoff.moments = 'reset', or give a checkpoint with Adam's state."
            raise CheckpointError(Problem(f"{source.path}", f"moments ({moments})", "none", hint))
        self.moments = moments
        self.step = source.step if self.has_moments else 0
        self._dual_maps = {kind: DualMaps(operator, kind, moments) for kind in MOMENTS if self.has_moments}
        self.operator = operator
        self.source = source
        self._cached: dict[str, Tensor] = {}
        self.model_config = operator.large
        same = self.model_config.image_size == source.model_config.image_size
        self.files = tuple(file for file in source.files if same or file.name != model_record.IMAGE_PROCESSOR)
        self.carried = source.carried
        self.groups = source.groups if self.has_moments else ()

    def fingerprint(self) -> object | None:
        source = self.source.fingerprint()
        if source is None:
            return None
        # Fresh numbers come from the settings, not from the operator's tensors.
        settings = {name: str(value) for name, value in vars(self.operator.settings).items()}
        made_by = {"operator": digest_operator(self.operator), "settings": settings, "moments": self.moments}
        return {**made_by, "source": source}

    @property
    def has_moments(self) -> bool:
        return self.moments != "reset"

    def info(self, key: str) -> TensorInfo:
        param = self.arch.param(key)
        stored = self.source.info(param.key.format(0)).dtype
        return TensorInfo(param.shape(self.model_config), torch.promote_types(stored, torch.float32))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        if kind != WEIGHT:
            return self._dual_maps[kind].grow(key, lambda small: self.source.read(small, kind))
        operator, param = self.operator, self.arch.param(key)
        rms = 0.0
        if operator.settings.fresh != "none":
            rms = random_init.root_mean_square(self.source.read(random_init.scale_source_key(operator, key)))
        grown = self._grow(key, random_init.added_rows(operator, key, rms))
        if operator.settings.borrow == "next" and param.in_layer and param.axes[0].use is Use.OUTPUT:
            # New features' rows are those of the next layer (bert2BERT's AKI).
            own = axis_size(param.axes[0], operator.small)
            grown = torch.cat([grown[:own], self._grow(key, further=1)[own:]])
        more = random_init.added_block(operator, key, rms)
        return grown if more is None else grown + more

    def _grow(self, key: str, joined: Tensor | None = None, further: int = 0) -> Tensor:
        mixed = self.operator.mix_layers(
            key, self._read_cached if self._mixes_layers(key) else self.source.read, further
        )
        mixed = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        return self.operator.grow(key, mixed, joined)

    def _mixes_layers(self, key: str) -> bool:
        """Whether each large layer takes from several small ones."""
        name = self.operator.depth_name(key)
        return name is not None and bool((self.operator.tensor(name)[-1] != 0).sum() > 1)

    def _read_cached(self, key: str) -> Tensor:
        """A small tensor that every large layer asks for; mostly a view of a mapped file."""
        if key not in self._cached:
            self._cached[key] = self.source.read(key)
        return self._cached[key]


def digest_operator(operator: Operator) -> str:
    """Digest of all of an operator's tensors."""
    parts = [f"{name} {digest.hash_bytes(digest.as_bytes(operator.tensor(name)))}" for name in operator.shapes()]
    return digest.hash_bytes("\n".join(parts).encode())


def digest_weights(source: Reader) -> str:
    """Digest of all of a checkpoint's canonical tensors, the same in any format that stores the same numbers."""
    parts = [f"{key} {digest.hash_bytes(digest.as_bytes(source.read(key)))}" for key in sorted(source.keys())]
    return digest.hash_bytes("\n".join(parts).encode())


def check_source(operator: Operator, source: Reader) -> None:
    """The source must be of the sizes that the operator was made for."""
    errors = ErrorCollector(f"the operator was made for another small model than {source.path}", CheckpointError)
    found = source.model_config.to_json()
    for name, expected in operator.small.to_json().items():
        if found[name] != expected:
            errors.add(name, expected, found[name])
    errors.raise_if_any()

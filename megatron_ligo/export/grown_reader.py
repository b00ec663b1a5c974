"""Growth as a Reader: a large checkpoint whose tensors are computed, one at a time, from a small one.

Every format can write it, and the large model is never in memory as a whole.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Use, axis_size
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import digest_file
from megatron_ligo.export.layer_mixing import DepthMixer
from megatron_ligo.export.mixture_reader import as_mixture_reader
from megatron_ligo.growth import random_init
from megatron_ligo.growth.adam_state import DualMaps
from megatron_ligo.growth.codes.codes_file import TENSORS
from megatron_ligo.growth.operator import Operator

CPU = torch.device("cpu")


class GrownReader(Reader):
    """An operator applied to a small checkpoint. Tensors are fp32, or fp64 if the source is fp64.

    moments: policy for Adam's state: "reset" drops it, "grow" and "old" grow it (growth/adam_state.py) and need a
    source that has it. device: where the products of matrices are computed; tensors are returned on the CPU.
    """

    format = "grown"
    path = None

    def __init__(self, operator: Operator, source: Reader, moments: str = "reset", device: torch.device = CPU) -> None:
        if operator.small.num_experts == 1:
            source = as_mixture_reader(source, operator.settings.expert_start)
        check_source(operator, source)
        if moments != "reset" and not source.has_moments:
            hint = "Set handoff.moments = 'reset', or use a checkpoint with Adam's state."
            expected = f"Adam's moments (handoff.moments = {moments!r})"
            moments_read = f"none that is read: {'; '.join(source.unread)}" if source.unread else "none"
            raise CheckpointError(Problem(f"{source.path}", expected, moments_read, hint))
        self.moments = moments
        self.step = source.step if self.has_moments else 0
        self._dual_maps = {kind: DualMaps(operator, kind, moments) for kind in MOMENTS if self.has_moments}
        self.operator = operator
        self.source = source
        self.device = device
        self._mixer = DepthMixer(operator, source, device)
        self.model_config = operator.large
        same_images = self.model_config.image_size == source.model_config.image_size
        self.files = tuple(file for file in source.files if same_images or file.name != model_record.IMAGE_PROCESSOR)
        self.carried, self.accepted = source.carried, source.accepted
        self.groups = source.groups if self.has_moments else ()

    def fingerprint(self) -> object | None:
        source = self.source.fingerprint()
        if source is None:
            return None
        # Random weights depend on the settings (the seed), not on the operator's tensors.
        settings = {name: str(value) for name, value in vars(self.operator.settings).items()}
        if self.operator.settings.codes:
            settings["codes"] = digest_file(Path(self.operator.settings.codes) / TENSORS)
        growth = {"operator": digest_operator(self.operator), "settings": settings, "moments": self.moments}
        if self.device != CPU:
            # Sums of another device end in other bits: a hand-off is completed where it was begun.
            growth["device"] = self.device.type
        return {**growth, "source": source}

    @property
    def has_moments(self) -> bool:
        return self.moments != "reset"

    def info(self, key: str) -> TensorInfo:
        param = self.arch.param(key)
        first = min(int(param.skips_first_layer), self.operator.small.num_layers - 1)
        small_key = (
            param.key.format(first, 0) if first or not param.skips_first_layer else next(iter(self.source.keys()))
        )
        source_dtype = self.source.info(small_key).dtype
        return TensorInfo(param.shape(self.model_config), torch.promote_types(source_dtype, torch.float32))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        """Computes a large tensor in its canonical shape: a weight, or one of Adam's moments."""
        if kind != WEIGHT:
            return self._dual_maps[kind].grow(key, lambda small_key: self.source.read(small_key, kind))
        rms = self._random_scale(key)
        grown = self._grow(key, random_rows=random_init.added_rows(self.operator, key, rms))
        if self._borrows_from_next_layer(key):
            num_old = axis_size(self.arch.param(key).axes[0], self.operator.small)
            grown = torch.cat([grown[:num_old], self._grow(key, layer_offset=1)[num_old:]])
        noise = random_init.weight_noise(self.operator, key, grown)
        grown = grown if noise is None else grown + noise
        random_block = random_init.added_block(self.operator, key, rms)
        return grown if random_block is None else grown + random_block

    def _random_scale(self, key: str) -> float:
        """Returns the root mean square of a small matrix, which is that of the random weights that extend it."""
        if self.operator.settings.fresh in random_init.BY_SIZE or len(self.arch.param(key).axes) < 2:
            return 0.0
        return random_init.root_mean_square(self.source.read(random_init.scale_source_key(self.operator, key)))

    def _borrows_from_next_layer(self, key: str) -> bool:
        """True if new output features copy the next small layer's (AKI of bert2BERT, arXiv 2110.07143)."""
        param = self.arch.param(key)
        return self.operator.settings.borrow == "next" and param.in_layer and param.axes[0].use is Use.OUTPUT

    def _grow(self, key: str, random_rows: Tensor | None = None, layer_offset: int = 0) -> Tensor:
        """Mixes the small layers' tensors and applies the width maps. Returns the large shape, fp32 or wider.

        random_rows: (large out, small in), added between the two maps. layer_offset: shifts the small layers.
        """
        mixed = self._mixer.mix(key, layer_offset)
        device = self._product_device(key)
        mixed = mixed.to(device, torch.promote_types(mixed.dtype, torch.float32))
        return self.operator.grow(key, mixed, None if random_rows is None else random_rows.to(device)).cpu()

    def _product_device(self, key: str) -> torch.device:
        """Returns where a tensor is grown. Vectors have no products, and parts of experts are drawn on the CPU."""
        is_matrix = len(self.arch.param(key).axes) == 2
        return self.device if is_matrix and not self.operator.settings.expert_drop else CPU


def digest_operator(operator: Operator) -> str:
    """Returns a digest of all tensors of an operator."""
    lines = [f"{name} {digest.hash_bytes(digest.as_bytes(operator.tensor(name)))}" for name in operator.shapes()]
    return digest.hash_bytes("\n".join(lines).encode())


def check_source(operator: Operator, source: Reader) -> None:
    """Raises CheckpointError unless the source has the sizes of the operator's small model."""
    errors = ErrorCollector(f"the operator was made for another small model than {source.path}", CheckpointError)
    sizes = source.model_config.to_json()
    for name, expected in operator.small.to_json().items():
        if sizes[name] != expected:
            errors.add(name, expected, sizes[name])
    errors.raise_if_any()

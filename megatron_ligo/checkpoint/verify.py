"""Compares two checkpoints of any formats and layouts bit for bit, by manifest, or by logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import manifest
from megatron_ligo.checkpoint.formats.hf.transformers_model import build_model
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError

BATCH, LENGTH, SEED = 2, 64, 1234


@dataclass
class ComparisonResult:
    """The number of tensors compared, and a line for each difference."""

    compared: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.differences


def compare(a: Reader, b: Reader, *, values_only: bool = False) -> ComparisonResult:
    """Compares sizes and every canonical tensor bit for bit; moments and step too if both have them.

    values_only: tensors with equal numbers are equal, whatever their dtypes.
    """
    result = ComparisonResult()
    ours, theirs = a.model_config.to_json(), b.model_config.to_json()
    for name in ours:
        if ours[name] != theirs[name]:
            result.differences.append(f"{name}: {ours[name]} and {theirs[name]}")
    keys, others = list(a.keys()), set(b.keys())
    result.differences += [f"{key}: only in the first" for key in keys if key not in others]
    result.differences += [f"{key}: only in the second" for key in b.keys() if key not in set(keys)]  # noqa: SIM118
    kinds = [WEIGHT]
    if a.has_moments and b.has_moments:
        kinds += MOMENTS
        if a.step != b.step:
            result.differences.append(f"step: {a.step} and {b.step}")
    for key in (key for key in keys if key in others):
        for kind in kinds:
            difference = _describe_difference(a.read(key, kind), b.read(key, kind), values_only)
            result.compared += 1
            if difference:
                result.differences.append(f"{key}{'' if kind == WEIGHT else f' ({kind})'}: {difference}")
    return result


def _describe_difference(a: Tensor, b: Tensor, values_only: bool) -> str:
    """Describes how two tensors of any shapes differ; "" if they do not."""
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} and {tuple(b.shape)}"
    if digest.same_bits(a, b):
        return ""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    distance = (a.to(wide) - b.to(wide)).abs()
    count, largest = int((distance != 0).sum()), float(distance.max()) if distance.numel() else 0.0
    if a.dtype != b.dtype:
        if values_only and not count:
            return ""
        return f"dtype {_dtype_name(a)} and {_dtype_name(b)}, largest difference {largest:.3e}"
    return f"{count} of {a.numel()} numbers differ, largest difference {largest:.3e}" if count else "signs of zeros"


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_manifest(reader: Reader) -> ComparisonResult:
    """Compares every tensor and file with the digests and sizes in the checkpoint's manifest."""
    root = _folder(reader)
    recorded = manifest.load_manifest(root)
    result = ComparisonResult()
    for name, size in recorded.files.items():
        actual = (root / name).stat().st_size if (root / name).is_file() else None
        if actual != size:
            result.differences.append(f"{name}: {size} bytes recorded, {'missing' if actual is None else actual}")
    keys = list(reader.keys())
    result.differences += [f"{key}: not in the manifest" for key in keys if key not in recorded.tensors]
    result.differences += [f"{key}: only in the manifest" for key in recorded.tensors if key not in keys]
    for key in (key for key in keys if key in recorded.tensors):
        for kind, entry in recorded.tensors[key].items():
            result.compared += 1
            try:
                tensor = reader.read(key, kind)
            except CheckpointError as error:
                result.differences.append(f"{key} ({kind}): {error}")
                continue
            actual = {
                "shape": list(tensor.shape),
                "dtype": _dtype_name(tensor),
                "digest": digest.hash_bytes(digest.as_bytes(tensor)),
            }
            changes = [
                f"{name} {value}, recorded {entry[name]}" for name, value in actual.items() if value != entry[name]
            ]
            if changes:
                result.differences.append(f"{key} ({kind}): {'; '.join(changes)}")
    return result


def has_manifest(reader: Reader) -> bool:
    return reader.path is not None and (_folder(reader) / manifest.MANIFEST).is_file()


def _folder(reader: Reader) -> Path:
    assert reader.path is not None, "a checkpoint in memory has no manifest"
    return reader.path if reader.path.is_dir() else reader.path.parent


def sample_inputs(a: ModelConfig, b: ModelConfig) -> Tensor:
    """Draws inputs that both models take: token ids (batch, length) int64, or fp32 images (batch, channels, height,
    width) of the larger model's size.
    """
    generator = torch.Generator().manual_seed(SEED)
    if a.image_size is not None and b.image_size is not None:
        side = max(a.image_size, b.image_size)
        return torch.randn(BATCH, a.num_channels, side, side, generator=generator)
    length = min(LENGTH, a.max_sequence_length, b.max_sequence_length)
    return torch.randint(0, min(a.vocab_size, b.vocab_size), (BATCH, length), generator=generator)


@torch.no_grad()
def compute_logits(reader: Reader, inputs: Tensor) -> Tensor:
    """Runs transformers' model of a checkpoint, in fp32, on inputs as `sample_inputs` draws them.

    Returns logits (batch, length, vocab) or (batch, labels), or the hidden states (batch, length, hidden) of a model
    without a head. Positions are interpolated for images of another size than the model's. Builds the whole model in
    memory.
    """
    model = build_model(reader, torch.float32)
    other_size = reader.model_config.image_size not in (None, inputs.shape[-1])
    return model(inputs, **({"interpolate_pos_encoding": True} if other_size else {}))[0]

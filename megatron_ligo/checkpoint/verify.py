"""Are two checkpoints the same? Bit for bit, in any formats and layouts; by their manifests; by their logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import manifest
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding.fused_tensors import stored_tensors

BATCH, LENGTH, SEED = 2, 64, 1234


@dataclass
class ComparisonResult:
    """What was compared, and a line for each difference."""

    compared: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.differences


def compare(a: Reader, b: Reader, *, values_only: bool = False) -> ComparisonResult:
    """Sizes, and every canonical tensor bit for bit (moments and step too where both have them).

    values_only: another dtype is no difference where every number is the same.
    """
    report = ComparisonResult()
    ours, theirs = a.model_config.to_json(), b.model_config.to_json()
    for name in ours:
        if ours[name] != theirs[name]:
            report.differences.append(f"{name}: {ours[name]} and {theirs[name]}")
    keys, others = list(a.keys()), set(b.keys())
    report.differences += [f"{key}: only in the first" for key in keys if key not in others]
    report.differences += [f"{key}: only in the second" for key in b.keys() if key not in set(keys)]  # noqa: SIM118
    kinds = [WEIGHT]
    if a.has_moments and b.has_moments:
        kinds += MOMENTS
        if a.step != b.step:
            report.differences.append(f"step: {a.step} and {b.step}")
    for key in (key for key in keys if key in others):
        for kind in kinds:
            found = _describe_difference(a.read(key, kind), b.read(key, kind), values_only)
            report.compared += 1
            if found:
                report.differences.append(f"{key}{'' if kind == WEIGHT else f' ({kind})'}: {found}")
    return report


def _describe_difference(a: Tensor, b: Tensor, values_only: bool) -> str:
    """How two tensors differ, or ""."""
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} and {tuple(b.shape)}"
    if digest.same_bits(a, b):
        return ""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    far = (a.to(wide) - b.to(wide)).abs()
    count, largest = int((far != 0).sum()), float(far.max()) if far.numel() else 0.0
    if a.dtype != b.dtype:
        if values_only and not count:
            return ""
        return f"dtype {_dtype_name(a)} and {_dtype_name(b)}, largest difference {largest:.3e}"
    return f"{count} of {a.numel()} numbers differ, largest difference {largest:.3e}" if count else "signs of zeros"


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_manifest(reader: Reader) -> ComparisonResult:
    """Every tensor and file against the digests and sizes in the manifest beside it."""
    root = _folder(reader)
    noted = manifest.load_manifest(root)
    report = ComparisonResult()
    for name, size in noted.files.items():
        found = (root / name).stat().st_size if (root / name).is_file() else None
        if found != size:
            report.differences.append(f"{name}: {size} bytes noted, {'missing' if found is None else found}")
    keys = list(reader.keys())
    report.differences += [f"{key}: not in the manifest" for key in keys if key not in noted.tensors]
    report.differences += [f"{key}: only in the manifest" for key in noted.tensors if key not in keys]
    for key in (key for key in keys if key in noted.tensors):
        for kind, entry in noted.tensors[key].items():
            tensor = reader.read(key, kind)
            report.compared += 1
            found = {
                "shape": list(tensor.shape),
                "dtype": _dtype_name(tensor),
                "digest": digest.hash_bytes(digest.as_bytes(tensor)),
            }
            wrong = [f"{name} {found[name]}, noted {entry[name]}" for name in found if found[name] != entry[name]]
            if wrong:
                report.differences.append(f"{key} ({kind}): {'; '.join(wrong)}")
    return report


def has_manifest(reader: Reader) -> bool:
    return reader.path is not None and (_folder(reader) / manifest.MANIFEST).is_file()


def _folder(reader: Reader) -> Path:
    assert reader.path is not None, "what lies in no folder has no manifest"
    return reader.path if reader.path.is_dir() else reader.path.parent


def compare_logits(a: Reader, b: Reader) -> tuple[float, float]:
    """Largest difference of the outputs of transformers' models on one fixed batch in fp32, and the largest output."""
    seen = sample_inputs(a.model_config, b.model_config)
    first, second = compute_logits(a, seen), compute_logits(b, seen)
    if first.shape != second.shape:
        raise CheckpointError(Problem("logits", f"shape {tuple(first.shape)}", tuple(second.shape)))
    return float((first - second).abs().max()), float(first.abs().max())


def sample_inputs(a: ModelConfig, b: ModelConfig) -> Tensor:
    """What both models can be shown: tokens (batch, length), or images (batch, channels, height, width) of the size of
    the larger model's."""
    generator = torch.Generator().manual_seed(SEED)
    if a.image_size is not None and b.image_size is not None:
        side = max(a.image_size, b.image_size)
        return torch.randn(BATCH, a.num_channels, side, side, generator=generator)
    length = min(LENGTH, a.longest_sequence, b.longest_sequence)
    return torch.randint(0, min(a.vocab_size, b.vocab_size), (BATCH, length), generator=generator)


@torch.no_grad()
def compute_logits(reader: Reader, inputs: Tensor) -> Tensor:
    """What transformers' model of a checkpoint gives for tokens or images (`sample`), in fp32.

    (batch, length, vocab), (batch, labels), or the hidden states of a model without a head. Images of another size than
    the model's are seen with interpolated positions. Holds the whole model.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = config_json.to_hf_config(reader.model_config, reader.carried, torch.float32)
    made = CONFIG_MAPPING[reader.model_config.model_type](**config)
    # transformers has other names in memory than in its files: only this way in translates them.
    transformers.utils.logging.disable_progress_bar()
    load = getattr(transformers, config["architectures"][0]).from_pretrained
    model, told = load(None, config=made, state_dict=dict(_hf_state_dict(reader)), output_loading_info=True)
    left, missing = set(told["unexpected_keys"]), set(told["missing_keys"])
    # A class may lack an optional part that is there, or have one that is not: neither changes what comes out first.
    params = [param for param in reader.arch.params if param.requires or param.tied_to]
    optional = {param.locations["hf"].name for param in params}
    optional |= {reader.arch.stored_name(param.key, reader.model_config, "hf") for param in params}
    assert left | missing <= optional, f"{type(model).__name__}: left {left}, missing {missing}"
    other_size = reader.model_config.image_size not in (None, inputs.shape[-1])
    return model.eval()(inputs, **({"interpolate_pos_encoding": True} if other_size else {}))[0]


def _hf_state_dict(reader: Reader) -> Iterator[tuple[str, Tensor]]:
    for name, item in stored_tensors(reader.arch, reader.model_config, "hf").items():
        yield name, item.assemble([reader.read(key).float() for key in item.keys], reader.model_config)

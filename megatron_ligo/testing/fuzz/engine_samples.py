"""Writes a DeepSpeed engine's checkpoint files without an engine: ZeRO optimizer states in DeepSpeed's own classes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

DP = 2
STEPS = 7
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "amsgrad": False}
WEIGHT_DECAYS = (0.0, 0.1)


def adam_moments(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns made-up moments in the weight's shape."""
    return {"exp_avg": weight * 0.125, "exp_avg_sq": weight * weight}


def write_engine_files(tag: Path, stage: int) -> None:
    """Turns a folder's module states (mp_rank_XX) into an engine's checkpoint at DP 2 with fp32 masters."""
    for path in sorted(tag.glob("mp_rank_*_model_states.pt")):
        state = torch.load(path, weights_only=True)
        tensors = {name: tensor.float().contiguous() for name, tensor in state["module"].items()}
        names = sorted(tensors)
        half = len(names) // 2
        groups = [names[:half], names[half:]]
        state |= {"dp_world_size": DP, "global_steps": 2 * STEPS, "ds_version": "0.19.8"}
        state["param_shapes"] = [OrderedDict((name, tensors[name].shape) for name in group) for group in groups]
        if stage == 3:
            state["module"] = {name: torch.empty(0) for name in names}
            for rank in range(DP):
                torch.save(state, tag / f"zero_pp_rank_{rank}_{path.name}")
            path.unlink()
        else:
            torch.save(state, path)
        for rank in range(DP):
            parts = [
                (_padded_partition if stage == 3 else _flat_partition)([tensors[name] for name in group], rank)
                for group in groups
            ]
            file = path.name.replace("model_states", "optim_states")
            torch.save(
                {"optimizer_state_dict": _optimizer_state(stage, groups, parts)}, tag / f"zero_pp_rank_{rank}_{file}"
            )


def _optimizer_state(stage: int, groups: list[list[str]], parts: list[tuple]) -> dict:
    flats = [flat for flat, _ in parts]
    base = {
        "state": {i: {"step": torch.tensor(float(STEPS)), **adam_moments(flat)} for i, flat in enumerate(flats)},
        "param_groups": [{**SETTINGS, "weight_decay": decay, "params": [i]} for i, decay in enumerate(WEIGHT_DECAYS)],
    }
    common = {"zero_stage": ZeroStageEnum(stage), "partition_count": DP}
    if stage == 3:
        scaler = DynamicLossScaler(1.0, 2.0, 1000, 1.0, 1, False)
        return {**common, "loss_scaler": scaler, "fp32_flat_groups": flats, "optimizer_state_dict": base}
    mappings = [
        OrderedDict((name, address) for name, address in zip(group, addresses, strict=True) if address)
        for group, (_, addresses) in zip(groups, parts, strict=True)
    ]
    return {
        **common,
        "loss_scaler": LossScaler(1.0),
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": flats,
        "param_slice_mappings": mappings,
    }


def _flat_partition(tensors: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, list]:
    """Partitions as ZeRO 1 and 2 do: flattens all tensors and splits them equally; the last part has no padding."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    size = -(-flat.numel() // DP)
    low, high = rank * size, min((rank + 1) * size, flat.numel())
    addresses, start = [], 0
    for tensor in tensors:
        first, last = max(start, low), min(start + tensor.numel(), high)
        addresses.append(fragment_address(numel=last - first, start=first - low) if last > first else None)
        start += tensor.numel()
    return flat[low:high].clone(), addresses


def _padded_partition(tensors: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, None]:
    """Partitions as ZeRO 3 does: splits each tensor equally; the last part is padded."""
    parts = []
    for tensor in tensors:
        size = -(-tensor.numel() // DP)
        padded = torch.nn.functional.pad(tensor.flatten(), (0, size * DP - tensor.numel()), value=float("nan"))
        parts.append(padded[rank * size : (rank + 1) * size])
    return torch.cat(parts), None

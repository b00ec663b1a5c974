"""The backend of a distributed checkpoint: torch_dist, or none, where torch.distributed.checkpoint alone wrote it."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA_FILE
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import BACKEND, CONFIG_FILE
from megatron_ligo.checkpoint.io.iteration_folders import TRACKER
from megatron_ligo.common.errors import CheckpointError, Problem

# Of every attention that Megatron-core names.
MARK = b".self_attention.linear_qkv."
MAX_CONFIG_BYTES = 10_000


def is_distributed(folder: Path) -> bool:
    """Returns whether a folder holds a checkpoint of Megatron-core, with any backend, or lies where only its own do."""
    has_tensors = (folder / METADATA_FILE).is_file()
    if (folder / CONFIG_FILE).is_file():
        # zarr's has no metadata file.
        return has_tensors or _names_backend(folder / CONFIG_FILE)
    return has_tensors and ((folder.parent / TRACKER).is_file() or has_megatron_names(folder))


def has_megatron_names(folder: Path) -> bool:
    """Returns whether the metadata of torch.distributed.checkpoint in a folder has Megatron-core's parameters."""
    return MARK in (folder / METADATA_FILE).read_bytes()


def _names_backend(path: Path) -> bool:
    with path.open("rb") as file:
        return b"sharded_backend" in file.read(MAX_CONFIG_BYTES)


def check_backend(path: Path) -> None:
    """Raises CheckpointError unless a checkpoint's metadata.json, if it has one, names the backend torch_dist."""
    if not path.is_file() and (path.parent / METADATA_FILE).is_file():
        return
    config = config_json.load_config(path)
    if {name: config.get(name) for name in BACKEND} != BACKEND:
        hint = "Load and save it with a newer Megatron-core."
        raise CheckpointError(Problem(f"{path}", f"the backend torch_dist, version 1, {BACKEND}", config, hint))

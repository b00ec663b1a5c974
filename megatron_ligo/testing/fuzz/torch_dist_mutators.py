"""Samples and mutations of Megatron-core's distributed checkpoints (torch_dist)."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import torch

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA_FILE
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import COMMON_FILE, COMMON_OBJECT
from megatron_ligo.testing.fuzz.engine_samples import STEPS, adam_moments

OPTIMIZER = "__1_0.distcp"


def add_optimizer_state(folder: Path) -> None:
    """Adds Adam's moments to a checkpoint of weights, and stores the common state as Megatron-core 0.19 does."""
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    data = _load_metadata(folder / METADATA_FILE)
    content = bytearray()

    def add(name: str, offset: torch.Size | None, value: object) -> None:
        archive = _archive(value)
        data.storage_data[records.MetadataIndex(name, offset)] = _StorageInfo(OPTIMIZER, len(content), len(archive))
        content.extend(archive)

    for index, place in list(data.storage_data.items()):
        described = data.state_dict_metadata[index.fqn]
        if isinstance(described, records.BytesStorageMetadata):
            continue
        for state, value in adam_moments(_read_tensor(folder, place).float()).items():
            name = f"optimizer.state.{state}.{index.fqn}"
            properties = records.TensorProperties(dtype=torch.float32)
            data.state_dict_metadata[name] = records.TensorStorageMetadata(properties, described.size, described.chunks)
            add(name, index.offset, value)
    common = torch.load(folder / COMMON_FILE, weights_only=False)
    add(COMMON_OBJECT, None, [{**common, "optimizer": {"param_groups": [{"step": STEPS}]}}])
    data.state_dict_metadata[COMMON_OBJECT] = records.BytesStorageMetadata()
    (folder / COMMON_FILE).unlink()
    (folder / OPTIMIZER).write_bytes(content)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(data))


def edit_metadata(draw: random.Random, path: Path, values: tuple, numbers: tuple) -> str | None:
    """Changes, moves or deletes one entry of the metadata."""
    data = _load_metadata(path)
    index = draw.choice(sorted(data.storage_data, key=str))
    place, described = data.storage_data[index], data.state_dict_metadata[index.fqn]
    other = draw.choice(sorted(data.storage_data.values(), key=str))
    how = draw.choice(("file", "offset", "length", "size", "dtype", "chunk", "no place", "no tensor", "name"))
    if how in ("file", "offset", "length"):
        key = {"file": "relative_path"}.get(how, how)
        choices = (*(values if how == "file" else (*numbers, -1, place.offset + 1)), getattr(other, key))
        setattr(place, key, draw.choice(choices))
    elif how == "no place":
        del data.storage_data[index]
    elif how == "no tensor":
        del data.state_dict_metadata[index.fqn]
    elif how == "name":
        data.state_dict_metadata[draw.choice((None, 7, "", "../x"))] = data.state_dict_metadata.pop(index.fqn)
    elif hasattr(described, "chunks"):
        _edit_tensor_metadata(draw, described, how, values, numbers)
    else:
        return None
    path.write_bytes(pickle.dumps(data))
    return f"{path.name}: {index.fqn} {how}"


def _edit_tensor_metadata(draw: random.Random, described: object, how: str, values: tuple, numbers: tuple) -> None:
    if how == "dtype":
        described.properties.dtype = draw.choice((torch.int64, torch.bfloat16, torch.complex64, "float32", None))
    elif how == "size":
        described.size = draw.choice((torch.Size([draw.choice(numbers[:6])] * len(described.size)), *values))
    else:
        chunk = draw.choice(described.chunks)
        name = draw.choice(("offsets", "sizes"))
        sizes = list(getattr(chunk, name))
        if sizes:
            sizes[draw.randrange(len(sizes))] = draw.choice(numbers)
        setattr(chunk, name, draw.choice((sizes, tuple(sizes), *values)))


def point_chunks_outside(draw: random.Random, path: Path, prefix: str) -> None:
    """Points the chunks of one file to a file outside the folder."""
    data = _load_metadata(path)
    chosen = draw.choice(sorted({place.relative_path for place in data.storage_data.values()}))
    for place in data.storage_data.values():
        if place.relative_path == chosen:
            place.relative_path = prefix + chosen
    path.write_bytes(pickle.dumps(data))


def inject_archive(draw: random.Random, path: Path, program: bytes) -> str:
    """Points a chunk to an appended archive with a hostile pickle. Returns a description of the archive."""
    data = _load_metadata(path)
    index = draw.choice(sorted(data.storage_data, key=str))
    place = data.storage_data[index]
    archive = io.BytesIO()
    writer = torch.PyTorchFileWriter(archive)
    writer.write_record("data.pkl", program, len(program))
    writer.write_record("data/0", bytes(64), 64)
    writer.write_end_of_file()
    file = path.parent / place.relative_path
    place.offset, place.length = file.stat().st_size, len(archive.getvalue())
    with file.open("ab") as end:
        end.write(archive.getvalue())
    path.write_bytes(pickle.dumps(data))
    return f"the archive of {index.fqn}"


def _load_metadata(path: Path):
    # Safe: this module wrote the file.
    return pickle.loads(path.read_bytes())


def _archive(value: object) -> bytes:
    archive = io.BytesIO()
    torch.save(value, archive)
    return archive.getvalue()


def _read_tensor(folder: Path, place) -> torch.Tensor:
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)

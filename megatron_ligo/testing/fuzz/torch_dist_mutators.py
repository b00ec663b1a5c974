"""Megatron-core's distributed checkpoints: one as its newest release leaves it, and ways to spoil what they say."""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path

import torch

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import COMMON, COMMON_OBJECT
from megatron_ligo.testing.fuzz.engine_samples import STEPS, moments

OPTIMIZER = "__1_0.distcp"


def as_an_engine_leaves_it(folder: Path) -> None:
    """Adds Adam's moments to weights alone; what is no tensor becomes an object of the checkpoint."""
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    data = _metadata(folder / METADATA)
    content = bytearray()

    def add(name: str, offset: torch.Size | None, value: object) -> None:
        archive = _archive(value)
        data.storage_data[records.MetadataIndex(name, offset)] = _StorageInfo(OPTIMIZER, len(content), len(archive))
        content.extend(archive)

    for index, place in list(data.storage_data.items()):
        described = data.state_dict_metadata[index.fqn]
        if isinstance(described, records.BytesStorageMetadata):
            continue
        for state, value in moments(_tensor(folder, place).float()).items():
            name = f"optimizer.state.{state}.{index.fqn}"
            properties = records.TensorProperties(dtype=torch.float32)
            data.state_dict_metadata[name] = records.TensorStorageMetadata(properties, described.size, described.chunks)
            add(name, index.offset, value)
    common = torch.load(folder / COMMON, weights_only=False)
    add(COMMON_OBJECT, None, [{**common, "optimizer": {"param_groups": [{"step": STEPS}]}}])
    data.state_dict_metadata[COMMON_OBJECT] = records.BytesStorageMetadata()
    (folder / COMMON).unlink()
    (folder / OPTIMIZER).write_bytes(content)
    (folder / METADATA).write_bytes(pickle.dumps(data))


def edited(draw: random.Random, path: Path, values: tuple, numbers: tuple) -> str | None:
    """One thing that the metadata say is another of these, or is what they say elsewhere, or is gone."""
    data = _metadata(path)
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
        _redescribe(draw, described, how, values, numbers)
    else:
        return None
    path.write_bytes(pickle.dumps(data))
    return f"{path.name}: {index.fqn} {how}"


def _redescribe(draw: random.Random, described: object, how: str, values: tuple, numbers: tuple) -> None:
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


def led_out(draw: random.Random, path: Path, prefix: str) -> None:
    """Chunks lie in a file elsewhere, as they lie in the one here."""
    data = _metadata(path)
    chosen = draw.choice(sorted({place.relative_path for place in data.storage_data.values()}))
    for place in data.storage_data.values():
        if place.relative_path == chosen:
            place.relative_path = prefix + chosen
    path.write_bytes(pickle.dumps(data))


def hostile(draw: random.Random, path: Path, program: bytes) -> str:
    """The place of a chunk is that of an archive whose pickle is a program."""
    data = _metadata(path)
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


def _metadata(path: Path):
    # One that we have written.
    return pickle.loads(path.read_bytes())


def _archive(value: object) -> bytes:
    made = io.BytesIO()
    torch.save(value, made)
    return made.getvalue()


def _tensor(folder: Path, place) -> torch.Tensor:
    with (folder / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), weights_only=True)

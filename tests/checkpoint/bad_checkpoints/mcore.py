"""Distributed checkpoints of Megatron-core's that are damaged or hostile."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata
from tests.checkpoint.bad_checkpoints import Builder, edit_json, register
from tests.checkpoint.bad_checkpoints.universal import Evil

mcore: dict[str, Builder] = {}
adam_state: dict[str, Builder] = {}
FC2 = "decoder.layers.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"


def inside(folder: Path) -> Path:
    return folder / "release"


def entry(folder: Path, name: str):
    return dcp_metadata.read_metadata(inside(folder)).tensors[name]


def describe(folder: Path, name: str, found: dcp_metadata.ChunkedTensor | None) -> None:
    """Writes the metadata with another entry of a name, or without it."""
    tensors = dict(dcp_metadata.read_metadata(inside(folder)).tensors)
    tensors.pop(name, None)
    if found:
        tensors[name] = found
    (inside(folder) / ".metadata").write_bytes(dcp_metadata.pickle_metadata(tensors, {}))


def put(folder: Path, name: str, value: object) -> None:
    """Another archive for the first chunk of a tensor."""
    found = entry(folder, name)
    written = io.BytesIO()
    torch.save(value, written)
    first, *rest = found.chunks
    path = inside(folder) / first.file
    chunk = replace(first, file_offset=path.stat().st_size, file_length=len(written.getvalue()))
    path.write_bytes(path.read_bytes() + written.getvalue())
    describe(folder, name, replace(found, chunks=(chunk, *rest)))


def first_chunk(folder: Path, name: str, **changes) -> None:
    found = entry(folder, name)
    first, *rest = found.chunks
    describe(folder, name, replace(found, chunks=(replace(first, **changes), *rest)))


@register(mcore)
def no_metadata(folder):
    (inside(folder) / ".metadata").unlink()
    return ".metadata", "nothing there"


@register(mcore)
def metadata_that_runs_code(folder):
    (inside(folder) / ".metadata").write_bytes(pickle.dumps(Evil()))
    return "builtins.exec", "could run code"


@register(mcore)
def metadata_that_names_a_function(folder):
    (inside(folder) / ".metadata").write_bytes(pickle.dumps({"a": os.system}))
    return "system", "could run code"


@register(mcore)
def metadata_that_numbers_two_thousand_million_objects(folder):
    (inside(folder) / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    return "Metadata", "NoneType"


def nested(levels: int) -> list:
    """2^levels values in a few bytes."""
    tree = []
    for _ in range(levels):
        tree = [tree, tree]
    return tree


@register(mcore)
def metadata_that_nest_beyond_any_memory(folder):
    (inside(folder) / ".metadata").write_bytes(pickle.dumps(nested(40)))
    return ".metadata", "values at most"


@register(mcore)
def common_state_that_nests_beyond_any_memory(folder):
    torch.save({"iteration": nested(40)}, inside(folder) / "common.pt")
    return "common.pt", "values at most"


@register(mcore)
def common_state_that_holds_itself(folder):
    tree: dict = {"iteration": 1}
    tree["args"] = [tree]
    torch.save(tree, inside(folder) / "common.pt")
    return "common.pt", "do not hold themselves"


@register(mcore)
def metadata_of_other_things(folder):
    (inside(folder) / ".metadata").write_bytes(pickle.dumps({"a": torch.float32}))
    return "Metadata", "dict"


@register(mcore)
def metadata_cut_off(folder):
    path = inside(folder) / ".metadata"
    path.write_bytes(path.read_bytes()[:-100])
    return ".metadata", "whole pickle"


@register(mcore)
def metadata_of_noise(folder):
    (inside(folder) / ".metadata").write_bytes(bytes(range(256)))
    return ".metadata", "whole pickle"


@register(mcore)
def metadata_with_nothing_in_it(folder):
    from torch.distributed.checkpoint.metadata import Metadata

    (inside(folder) / ".metadata").write_bytes(pickle.dumps(Metadata([], storage_data=7)))
    return (".metadata",)


@register(mcore)
def a_file_is_missing(folder):
    (inside(folder) / "__0_1.distcp").unlink()
    return "__0_1.distcp", "nothing there"


@register(mcore)
def a_file_cut_off(folder):
    path = inside(folder) / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-10])
    return "__0_1.distcp", "cut off"


@register(mcore)
def a_file_too_many(folder):
    (inside(folder) / "__1_0.distcp").write_bytes(b"")
    return ("__1_0.distcp",)


@register(mcore)
def a_file_out_of_the_folder(folder):
    first_chunk(folder, FC2, file="../dims.json")
    return ("../dims.json",)


@register(mcore)
def a_file_of_noise(folder):
    path = inside(folder) / "__0_1.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    return "__0_1.distcp", "whole file of torch.save"


@register(mcore)
def a_chunk_that_runs_code(folder):
    put(folder, FC2, Evil())
    return "__0_1.distcp", "could run code"


@register(mcore)
def a_chunk_of_another_shape(folder):
    put(folder, FC2, torch.ones(1, 52, 48))
    return "__0_1.distcp", "(1, 48, 52)", "(1, 52, 48)"


@register(mcore)
def a_chunk_of_another_dtype(folder):
    put(folder, FC2, torch.ones(1, 48, 52, dtype=torch.bfloat16))
    return "torch.float32", "torch.bfloat16"


@register(mcore)
def a_chunk_that_is_two(folder):
    put(folder, FC2, [torch.ones(1, 48, 52), torch.ones(3)])
    return ("__0_1.distcp",)


@register(mcore)
def a_chunk_that_reaches_out_of_its_storage(folder):
    good = torch.ones(48 * 52)
    put(folder, FC2, good.as_strided((1, 24, 52), (1, 52, 1)))
    return ("(1, 24, 52)",)


@register(mcore)
def chunks_at_one_place(folder):
    found = entry(folder, FC2)
    first, second = found.chunks
    describe(folder, FC2, replace(found, chunks=(first, replace(second, offset=first.offset))))
    return FC2, "overlap"


@register(mcore)
def a_chunk_too_few(folder):
    found = entry(folder, FC2)
    describe(folder, FC2, replace(found, chunks=found.chunks[1:]))
    return FC2, "gaps"


@register(mcore)
def a_chunk_beyond_the_tensor(folder):
    first_chunk(folder, FC2, shape=(1 << 40, 48, 52))
    return FC2, "reach beyond"


@register(mcore)
def a_tensor_of_another_shape(folder):
    found = entry(folder, NORM)
    (chunk,) = found.chunks
    describe(folder, NORM, replace(found, shape=(47,), chunks=(replace(chunk, shape=(47,)),)))
    return NORM, "(48,)", "(47,)"


@register(mcore)
def a_tensor_of_integers(folder):
    describe(folder, NORM, replace(entry(folder, NORM), dtype=torch.int32))
    return NORM, "torch.int32"


@register(mcore)
def a_tensor_is_missing(folder):
    describe(folder, FC2, None)
    return "decoder.layers.1.mlp.linear_fc2.weight", "none"


@register(mcore)
def a_tensor_too_many(folder):
    describe(folder, "decoder.layers.mlp.router.weight", entry(folder, FC2))
    return ("router",)


@register(mcore)
def a_vocabulary_too_small(folder):
    name = "embedding.word_embeddings.weight"
    found = entry(folder, name)
    (chunk,) = found.chunks
    describe(folder, name, replace(found, shape=(30, 48), chunks=(replace(chunk, shape=(30, 48)),)))
    return name, "(37, 48)", "(30, 48)"


@register(mcore)
def another_backend(folder):
    edit_json(inside(folder) / "metadata.json", sharded_backend="zarr")
    return "zarr", "torch_dist"


@register(mcore)
def a_common_file_that_runs_code(folder):
    torch.save({"iteration": Evil()}, inside(folder) / "common.pt")
    return "common.pt", "could run code"


@register(mcore)
def an_iteration_of_no_number(folder):
    torch.save({"iteration": "seven"}, inside(folder) / "common.pt")
    return "iteration", "seven"


@register(mcore)
def no_sizes(folder):
    (folder / "dims.json").unlink()
    torch.save({"iteration": 1}, inside(folder) / "common.pt")
    return ("config.json",)


@register(mcore)
def a_million_layers(folder):
    model_config = json.loads((folder / "dims.json").read_text())["dims"]
    edit_json(folder / "dims.json", dims={**model_config, "num_layers": 1_000_000})
    return "num_layers", "1000000"


@register(mcore)
def a_tracker_out_of_the_folder(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    return ("latest_checkpointed_iteration.txt",)


@register(mcore)
def a_tracker_of_what_is_not_there(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return ("latest_checkpointed_iteration.txt",)


@register(mcore)
def a_family_that_is_none(folder):
    model_config = json.loads((folder / "dims.json").read_text())["dims"]
    edit_json(folder / "dims.json", dims={**model_config, "model_type": "9" * 500})
    return "model_type", "llama"


def _count(folder: Path, step: object) -> None:
    path = inside(folder) / "common.pt"
    state = torch.load(path, weights_only=False)
    state["optimizer"]["state"]["common_step"] = step
    torch.save(state, path)


@register(adam_state)
def a_count_of_letters(folder):
    _count(folder, "7")
    return "one count of the optimizer's steps", "'7'"


@register(adam_state)
def a_count_of_nan(folder):
    _count(folder, torch.tensor(float("nan")))
    return "one count of the optimizer's steps", "nan"


@register(adam_state)
def a_count_of_two(folder):
    _count(folder, torch.ones(2))
    return "one count of the optimizer's steps", "tensor([1., 1.])"


@register(adam_state)
def moments_of_another_shape(folder):
    for kind in ("exp_avg", "fp32_param"):
        name = f"optimizer.state.{kind}.{NORM}"
        found = entry(folder, name)
        (chunk,) = found.chunks
        describe(folder, name, replace(found, shape=(47,), chunks=(replace(chunk, shape=(47,)),)))
    return "2 problems", f"exp_avg.{NORM}", f"fp32_param.{NORM}", "(47,)"


@register(adam_state)
def moments_that_are_no_archive(folder):
    first_chunk(folder, f"optimizer.state.exp_avg_sq.{NORM}", file_offset=1)
    return ("distcp at 1",)

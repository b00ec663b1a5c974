"""Damaged or hostile distributed checkpoints of Megatron-core."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import torch

from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata
from tests.checkpoint.bad_checkpoints import Builder, edit_json, exactly, problem, register
from tests.checkpoint.bad_checkpoints.universal import Evil

mcore: dict[str, Builder] = {}
adam_state: dict[str, Builder] = {}
FC2 = "decoder.layers.mlp.linear_fc2.weight"
NORM = "decoder.final_layernorm.weight"


def iteration_folder(folder: Path) -> Path:
    return folder / "release"


def read_tensor(folder: Path, name: str) -> dcp_metadata.ChunkedTensor:
    return dcp_metadata.read_metadata(iteration_folder(folder)).tensors[name]


def set_tensor(folder: Path, name: str, tensor: dcp_metadata.ChunkedTensor | None) -> None:
    """Rewrites the metadata with another entry for a tensor, or without one."""
    tensors = dict(dcp_metadata.read_metadata(iteration_folder(folder)).tensors)
    tensors.pop(name, None)
    if tensor:
        tensors[name] = tensor
    (iteration_folder(folder) / ".metadata").write_bytes(dcp_metadata.pickle_metadata(tensors, {}))


def replace_first_archive(folder: Path, name: str, value: object) -> None:
    """Saves another value as the archive of a tensor's first chunk."""
    tensor = read_tensor(folder, name)
    archive = io.BytesIO()
    torch.save(value, archive)
    first, *rest = tensor.chunks
    path = iteration_folder(folder) / first.file
    chunk = replace(first, file_offset=path.stat().st_size, file_length=len(archive.getvalue()))
    path.write_bytes(path.read_bytes() + archive.getvalue())
    set_tensor(folder, name, replace(tensor, chunks=(chunk, *rest)))


def edit_first_chunk(folder: Path, name: str, **changes) -> None:
    tensor = read_tensor(folder, name)
    first, *rest = tensor.chunks
    set_tensor(folder, name, replace(tensor, chunks=(replace(first, **changes), *rest)))


@register(mcore)
def no_metadata(folder):
    (iteration_folder(folder) / ".metadata").unlink()
    return problem(where=".metadata")


@register(mcore)
def code_in_metadata(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(pickle.dumps(Evil()))
    return problem(where=".metadata", found="builtins.exec")


@register(mcore)
def metadata_that_names_a_function(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(pickle.dumps({"a": os.system}))
    return problem(where=".metadata", found="system")


@register(mcore)
def metadata_with_a_memo_of_two_billion(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")
    return problem(where=".metadata", expected="Metadata", found="NoneType")


def nested(levels: int) -> list:
    """Returns 2^levels values that pickle to a few bytes."""
    tree = []
    for _ in range(levels):
        tree = [tree, tree]
    return tree


@register(mcore)
def metadata_that_expands_exponentially(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(pickle.dumps(nested(40)))
    return problem(where=".metadata", expected="8388608")


@register(mcore)
def common_state_that_expands_exponentially(folder):
    torch.save({"iteration": nested(40)}, iteration_folder(folder) / "common.pt")
    return problem(where="common.pt", expected="8388608")


@register(mcore)
def recursive_common_state(folder):
    tree: dict = {"iteration": 1}
    tree["args"] = [tree]
    torch.save(tree, iteration_folder(folder) / "common.pt")
    return problem(where="common.pt", found="dict")


@register(mcore)
def metadata_that_is_a_dict(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(pickle.dumps({"a": torch.float32}))
    return problem(where=".metadata", expected="Metadata", found="dict")


@register(mcore)
def truncated_metadata(folder):
    path = iteration_folder(folder) / ".metadata"
    path.write_bytes(path.read_bytes()[:-100])
    return problem(where=".metadata", expected="pickle")


@register(mcore)
def random_bytes_as_metadata(folder):
    (iteration_folder(folder) / ".metadata").write_bytes(bytes(range(256)))
    return problem(where=".metadata", expected="pickle")


@register(mcore)
def metadata_of_wrong_types(folder):
    from torch.distributed.checkpoint.metadata import Metadata

    (iteration_folder(folder) / ".metadata").write_bytes(pickle.dumps(Metadata([], storage_data=7)))
    return problem(where=".metadata")


@register(mcore)
def missing_file(folder):
    (iteration_folder(folder) / "__0_1.distcp").unlink()
    return problem(where="__0_1.distcp", expected="file")


@register(mcore)
def truncated_file(folder):
    path = iteration_folder(folder) / "__0_1.distcp"
    path.write_bytes(path.read_bytes()[:-10])
    return problem(where="__0_1.distcp", expected="bytes")


@register(mcore)
def unexpected_file(folder):
    (iteration_folder(folder) / "__1_0.distcp").write_bytes(b"")
    return problem(where="__1_0.distcp")


@register(mcore)
def file_outside_the_folder(folder):
    edit_first_chunk(folder, FC2, file="../dims.json")
    return problem(where=".metadata", found="../dims.json")


@register(mcore)
def file_of_zeros(folder):
    path = iteration_folder(folder) / "__0_1.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    return problem(where="__0_1.distcp", expected="torch.save")


@register(mcore)
def code_in_chunk(folder):
    replace_first_archive(folder, FC2, Evil())
    return problem(where="__0_1.distcp", found="exec")


@register(mcore)
def chunk_of_another_shape(folder):
    replace_first_archive(folder, FC2, torch.ones(1, 52, 48))
    return problem(where="__0_1.distcp", expected="(1, 48, 52)", found="(1, 52, 48)")


@register(mcore)
def chunk_of_another_dtype(folder):
    replace_first_archive(folder, FC2, torch.ones(1, 48, 52, dtype=torch.bfloat16))
    return problem(where="__0_1.distcp", expected="torch.float32", found="torch.bfloat16")


@register(mcore)
def chunk_of_two_tensors(folder):
    replace_first_archive(folder, FC2, [torch.ones(1, 48, 52), torch.ones(3)])
    return problem(where="__0_1.distcp")


@register(mcore)
def chunk_of_a_strided_view(folder):
    tensor = torch.ones(48 * 52)
    replace_first_archive(folder, FC2, tensor.as_strided((1, 24, 52), (1, 52, 1)))
    return problem(where="__0_1.distcp", found="(1, 24, 52)")


@register(mcore)
def overlapping_chunks(folder):
    tensor = read_tensor(folder, FC2)
    first, second = tensor.chunks
    set_tensor(folder, FC2, replace(tensor, chunks=(first, replace(second, offset=first.offset))))
    return problem(where=FC2, expected="(2, 48, 52)", found="2 that overlap")


@register(mcore)
def missing_chunk(folder):
    tensor = read_tensor(folder, FC2)
    set_tensor(folder, FC2, replace(tensor, chunks=tensor.chunks[1:]))
    return problem(where=FC2, expected="(2, 48, 52)", found="1 that")


@register(mcore)
def chunk_beyond_the_tensor(folder):
    edit_first_chunk(folder, FC2, shape=(1 << 40, 48, 52))
    return problem(where=FC2, expected="(2, 48, 52)", found="beyond")


@register(mcore)
def tensor_of_another_shape(folder):
    tensor = read_tensor(folder, NORM)
    (chunk,) = tensor.chunks
    set_tensor(folder, NORM, replace(tensor, shape=(47,), chunks=(replace(chunk, shape=(47,)),)))
    return problem(where=NORM, expected="(48,)", found="(47,)")


@register(mcore)
def tensor_of_integers(folder):
    set_tensor(folder, NORM, replace(read_tensor(folder, NORM), dtype=torch.int32))
    return problem(where=NORM, found="torch.int32")


@register(mcore)
def missing_tensor(folder):
    set_tensor(folder, FC2, None)
    return problem(where="decoder.layers.1.mlp.linear_fc2.weight", found="none")


@register(mcore)
def unexpected_tensor(folder):
    set_tensor(folder, "decoder.layers.mlp.router.weight", replace(read_tensor(folder, FC2), shape=(0,), chunks=()))
    return problem(where="decoder.layers.mlp.router.weight")


@register(mcore)
def vocabulary_too_small(folder):
    name = "embedding.word_embeddings.weight"
    tensor = read_tensor(folder, name)
    (chunk,) = tensor.chunks
    set_tensor(folder, name, replace(tensor, shape=(30, 48), chunks=(replace(chunk, shape=(30, 48)),)))
    return problem(where=name, expected="(37, 48)", found="(30, 48)")


@register(mcore)
def another_backend(folder):
    edit_json(iteration_folder(folder) / "metadata.json", sharded_backend="zarr")
    return problem(where="metadata.json", expected="torch_dist", found="zarr")


@register(mcore)
def code_in_common_state(folder):
    torch.save({"iteration": Evil()}, iteration_folder(folder) / "common.pt")
    return problem(where="common.pt", found="exec")


@register(mcore)
def iteration_that_is_a_word(folder):
    torch.save({"iteration": "seven"}, iteration_folder(folder) / "common.pt")
    return problem(where="common.pt", expected="iteration", found="seven")


@register(mcore)
def no_model_config(folder):
    (folder / "dims.json").unlink()
    torch.save({"iteration": 1}, iteration_folder(folder) / "common.pt")
    return problem(where="release", expected="config.json")


@register(mcore)
def a_million_layers(folder):
    dims = json.loads((folder / "dims.json").read_text())["dims"]
    edit_json(folder / "dims.json", dims={**dims, "num_layers": 1_000_000})
    return ("num_layers", "1000000")


@register(mcore)
def tracker_outside_the_folder(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    return problem(where="latest_checkpointed_iteration.txt")


@register(mcore)
def tracker_to_a_missing_folder(folder):
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return problem(where="latest_checkpointed_iteration.txt")


@register(mcore)
def unknown_model_type(folder):
    dims = json.loads((folder / "dims.json").read_text())["dims"]
    edit_json(folder / "dims.json", dims={**dims, "model_type": "9" * 500})
    return ("model_type", "llama")


def _set_step_count(folder: Path, step: object) -> None:
    path = iteration_folder(folder) / "common.pt"
    state = torch.load(path, weights_only=False)
    state["optimizer"]["state"]["common_step"] = step
    torch.save(state, path)


@register(adam_state)
def step_count_of_letters(folder):
    _set_step_count(folder, "7")
    return problem(where="common.pt", expected="step count", found="'7'")


@register(adam_state)
def step_count_of_nan(folder):
    _set_step_count(folder, torch.tensor(float("nan")))
    return problem(where="common.pt", expected="step count", found="nan")


@register(adam_state)
def two_step_counts(folder):
    _set_step_count(folder, torch.ones(2))
    return problem(where="common.pt", expected="step count", found="tensor([1., 1.])")


@register(adam_state)
def moments_of_another_shape(folder):
    for kind in ("exp_avg", "fp32_param"):
        name = f"optimizer.state.{kind}.{NORM}"
        tensor = read_tensor(folder, name)
        (chunk,) = tensor.chunks
        set_tensor(folder, name, replace(tensor, shape=(47,), chunks=(replace(chunk, shape=(47,)),)))
    return exactly(
        problem(where=f"exp_avg.{NORM}", expected="(48,)", found="(47,)"),
        problem(where=f"fp32_param.{NORM}", expected="(48,)", found="(47,)"),
    )


@register(adam_state)
def moments_on_the_bytes_of_a_weight(folder):
    edit_first_chunk(folder, f"optimizer.state.exp_avg_sq.{NORM}", file_offset=1)
    return problem(f"optimizer.state.exp_avg_sq.{NORM}", "bytes of its own", NORM)

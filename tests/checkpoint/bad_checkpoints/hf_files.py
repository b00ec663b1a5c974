"""Hugging Face folders whose files are damaged or hostile: single ones, and shards with an index."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.checkpoint.bad_checkpoints import Builder, problem, register

MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
single: dict[str, Builder] = {}
sharded: dict[str, Builder] = {}


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(path: Path, header: dict | bytes, rest: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + rest)


@register(single)
def cut_off(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    return problem(MODEL)


@register(single)
def cut_off_in_the_header(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:100])
    return problem(MODEL)


@register(single)
def empty(folder):
    (folder / MODEL).write_bytes(b"")
    return problem(MODEL)


@register(single)
def longer_than_its_header_says(folder):
    with (folder / MODEL).open("ab") as file:
        file.write(b"more")
    return problem(MODEL)


@register(single)
def a_header_longer_than_the_file(folder):
    header, rest = header_of(folder / MODEL)
    put_header(folder / MODEL, header, rest, size=1 << 62)
    return problem(MODEL)


@register(single)
def a_header_that_overlaps(folder):
    header, rest = header_of(folder / MODEL)
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    put_header(folder / MODEL, header, rest)
    return problem(MODEL)


@register(single)
def a_header_beyond_the_end(folder):
    header, rest = header_of(folder / MODEL)
    start, end = header["lm_head.weight"]["data_offsets"]
    header["lm_head.weight"]["data_offsets"] = [start + len(rest), end + len(rest)]
    put_header(folder / MODEL, header, rest)
    return problem(MODEL)


@register(single)
def a_header_with_one_name_twice(folder):
    header, rest = header_of(folder / MODEL)
    entry = json.dumps(header["lm_head.weight"])
    text = json.dumps(header)[:-1] + f', "lm_head.weight": {entry}' + "}"
    put_header(folder / MODEL, text.encode(), rest)
    return problem(MODEL)


@register(single)
def a_header_with_many_names_twice(folder):
    """Told in linear time."""
    header, rest = header_of(folder / MODEL)
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [len(rest), len(rest)]})
    names = ", ".join(f'"x{number}": {entry}' for number in (*range(40_000), *range(40_000)))
    put_header(folder / MODEL, f"{json.dumps(header)[:-1]}, {names}}}".encode(), rest)
    return problem(MODEL, found="the key 'x0' and 39999 more keys twice")


@register(single)
def metadata_with_one_name_twice(folder):
    header, rest = header_of(folder / MODEL)
    text = json.dumps(header).replace('{"format": "pt"}', '{"format": "pt", "format": "tf"}')
    put_header(folder / MODEL, text.encode(), rest)
    return problem(MODEL, found="'format'")


@register(single)
def a_header_that_leaves_bytes_out(folder):
    header, rest = header_of(folder / MODEL)
    for name in set(header) - {"__metadata__"}:
        header[name]["data_offsets"] = [offset + 4 for offset in header[name]["data_offsets"]]
    put_header(folder / MODEL, header, bytes(4) + rest)
    return problem(MODEL)


@register(single)
def a_link_out_of_the_folder(folder):
    path = folder / MODEL
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to("../elsewhere.safetensors")
    return problem(MODEL, found="elsewhere.safetensors")


@register(single)
def one_file_and_an_index(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    return problem(found=f"{MODEL}, {INDEX}")


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


@register(sharded)
def a_shard_is_missing(folder):
    shard = first_shard(folder)
    shard.unlink()
    return problem(shard.name, INDEX) + problem("model.embed_tokens.weight")


@register(sharded)
def a_shard_that_the_index_does_not_list(folder):
    (folder / "model-00099-of-00099.safetensors").write_bytes(first_shard(folder).read_bytes())
    return problem("model-00099-of-00099.safetensors", INDEX)


@register(sharded)
def one_tensor_in_two_shards(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    state = {**load_file(shards[1]), "model.embed_tokens.weight": load_file(shards[0])["model.embed_tokens.weight"]}
    save_file(state, shards[1], {"format": "pt"})
    return problem("model.embed_tokens.weight", found=f"{shards[0].name} and {shards[1].name}")


@register(sharded)
def a_tensor_in_another_shard_than_the_index_says(folder):
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    edit_index(folder, lambda weight_map: weight_map.update({"model.embed_tokens.weight": last.name}))
    return problem("model.embed_tokens.weight", last.name)


@register(sharded)
def an_index_out_of_the_folder(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": "../a/model.safetensors"}))
    return problem("../a/model.safetensors")


@register(sharded)
def an_index_to_the_root(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": "/etc/passwd"}))
    return problem("/etc/passwd")


@register(sharded)
def an_index_to_the_folder_itself(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": "."}))
    return problem(": '.'")


@register(sharded)
def an_index_of_numbers(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": 3}))
    return problem(INDEX)


@register(sharded)
def an_index_without_its_map(folder):
    (folder / INDEX).write_text("{}")
    return problem(INDEX, "weight_map")


@register(sharded)
def no_index(folder):
    (folder / INDEX).unlink()
    return problem(expected=INDEX)


@register(sharded)
def an_index_with_one_name_twice(folder):
    text = (folder / INDEX).read_text()
    start = text.index('"lm_head.weight"')
    (folder / INDEX).write_text(f'{text[:start]}"lm_head.weight": "{first_shard(folder).name}", {text[start:]}')
    return problem(INDEX, found="lm_head.weight")


@register(sharded)
def an_index_to_half_a_character(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": "\ud800"}))
    return problem(where="\\ud800")


@register(sharded)
def an_index_to_an_endless_name(folder):
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": "a" * 5000}))
    return problem(where="aaaa")

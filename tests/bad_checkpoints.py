"""Checkpoints with one rule broken each: a builder damages a good folder, and says words that the error must have."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
Builder = Callable[[Path], tuple[str, ...]]

# Each damages a Hugging Face folder of one file (llama, untied).
hf: dict[str, Builder] = {}
# Each damages a Hugging Face folder of several shards.
hf_sharded: dict[str, Builder] = {}
# Each damages a universal checkpoint.
universal: dict[str, Builder] = {}


def of(table: dict[str, Builder]) -> Callable[[Builder], Builder]:
    def note(builder: Builder) -> Builder:
        table[builder.__name__] = builder
        return builder

    return note


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / MODEL)
    change(state)
    save_file(state, folder / MODEL, {"format": "pt"})


def header_of(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_header(path: Path, header: dict | bytes, rest: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + rest)


@of(hf)
def missing_tensors(folder):
    def change(state):
        del state["model.layers.0.self_attn.q_proj.weight"], state["model.norm.weight"]

    edit_tensors(folder, change)
    return "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "2 faults"


@of(hf)
def unexpected_tensors(folder):
    edit_tensors(
        folder, lambda state: state.update({"model.layers.0.extra": torch.ones(1), "score.weight": torch.ones(1)})
    )
    return "model.layers.0.extra", "score.weight", "2 faults"


@of(hf)
def misshaped_tensors(folder):
    edit_tensors(folder, lambda state: state.update({"model.norm.weight": torch.ones(47)}))
    return "model.norm.weight", "(48,)", "(47,)"


@of(hf)
def integer_tensors(folder):
    edit_tensors(folder, lambda state: state.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    return "model.norm.weight", "I8"


@of(hf)
def more_layers_in_the_config(folder):
    edit_json(folder / CONFIG, num_hidden_layers=3)
    return "model.layers.2.mlp.up_proj.weight", "9 faults"


@of(hf)
def fewer_layers_in_the_config(folder):
    edit_json(folder / CONFIG, num_hidden_layers=1)
    return "model.layers.1.mlp.up_proj.weight", "9 faults"


@of(hf)
def a_million_layers(folder):
    edit_json(folder / CONFIG, num_hidden_layers=10**15)
    return ("num_layers",)


@of(hf)
def other_sizes_in_the_config(folder):
    edit_json(folder / CONFIG, vocab_size=38, num_key_value_heads=3)
    return "model.embed_tokens.weight", "lm_head.weight", "k_proj"


@of(hf)
def tied_in_the_config_only(folder):
    edit_json(folder / CONFIG, tie_word_embeddings=True)
    return "lm_head.weight", "tie_word_embeddings"


@of(hf)
def untied_without_a_head(folder):
    edit_tensors(folder, lambda state: state.pop("lm_head.weight"))
    return ("lm_head.weight",)


@of(hf)
def another_activation(folder):
    edit_json(folder / CONFIG, hidden_act="gelu")
    return "hidden_act", "silu"


@of(hf)
def biases(folder):
    edit_json(folder / CONFIG, mlp_bias=True, attention_bias=True)
    return "mlp_bias", "attention_bias"


@of(hf)
def an_unknown_family(folder):
    edit_json(folder / CONFIG, model_type="lama")
    return "model_type", "'llama'"


@of(hf)
def quantised(folder):
    edit_json(folder / CONFIG, quantization_config={"bits": 4})
    return ("quantization_config",)


@of(hf)
def code_of_its_own(folder):
    edit_json(folder / CONFIG, auto_map={"AutoModel": "evil.Model"})
    return ("auto_map",)


@of(hf)
def partial_rotation(folder):
    edit_json(
        folder / CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    return ("partial_rotary_factor",)


@of(hf)
def rotation_by_kind_of_layer(folder):
    edit_json(folder / CONFIG, rope_parameters={"full_attention": {"rope_theta": 1.0}})
    return ("rope_parameters",)


@of(hf)
def windows_in_some_layers(folder):
    edit_json(folder / CONFIG, layer_types=["full_attention", "sliding_attention"])
    return ("layer_types",)


@of(hf)
def sizes_of_another_kind(folder):
    edit_json(folder / CONFIG, hidden_size="48", rms_norm_eps=None, tie_word_embeddings="no", num_attention_heads=-6)
    return "hidden_size", "norm_eps", "tied", "num_heads"


@of(hf)
def numbers_that_are_none(folder):
    edit_json(folder / CONFIG, rms_norm_eps=float("nan"), rope_parameters=None, rope_theta=float("inf"))
    return "norm_eps", "rope_base"


@of(hf)
def no_config(folder):
    (folder / CONFIG).unlink()
    return ("config",)


@of(hf)
def a_config_that_is_no_json(folder):
    (folder / CONFIG).write_text('{"model_type": "llama",')
    return "config.json", "JSON"


@of(hf)
def a_config_that_is_a_list(folder):
    (folder / CONFIG).write_text("[]")
    return "config.json", "object"


@of(hf)
def a_config_of_brackets(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    return "config.json", "JSON"


@of(hf)
def cut_off(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:-1])
    return (MODEL,)


@of(hf)
def cut_off_in_the_header(folder):
    path = folder / MODEL
    path.write_bytes(path.read_bytes()[:100])
    return (MODEL,)


@of(hf)
def empty(folder):
    (folder / MODEL).write_bytes(b"")
    return (MODEL,)


@of(hf)
def longer_than_its_header_says(folder):
    with (folder / MODEL).open("ab") as file:
        file.write(b"more")
    return (MODEL,)


@of(hf)
def a_header_longer_than_the_file(folder):
    header, rest = header_of(folder / MODEL)
    put_header(folder / MODEL, header, rest, size=1 << 62)
    return (MODEL,)


@of(hf)
def a_header_that_overlaps(folder):
    header, rest = header_of(folder / MODEL)
    header["lm_head.weight"]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"]
    put_header(folder / MODEL, header, rest)
    return (MODEL,)


@of(hf)
def a_header_beyond_the_end(folder):
    header, rest = header_of(folder / MODEL)
    start, end = header["lm_head.weight"]["data_offsets"]
    header["lm_head.weight"]["data_offsets"] = [start + len(rest), end + len(rest)]
    put_header(folder / MODEL, header, rest)
    return (MODEL,)


@of(hf)
def a_header_with_one_name_twice(folder):
    header, rest = header_of(folder / MODEL)
    entry = json.dumps(header["lm_head.weight"])
    text = json.dumps(header)[:-1] + f', "lm_head.weight": {entry}' + "}"
    put_header(folder / MODEL, text.encode(), rest)
    return (MODEL,)


@of(hf)
def a_link_out_of_the_folder(folder):
    path = folder / MODEL
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to("../elsewhere.safetensors")
    return MODEL, "leads out"


@of(hf)
def one_file_and_an_index(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    return MODEL, INDEX


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    data = json.loads((folder / INDEX).read_text())
    change(data["weight_map"])
    (folder / INDEX).write_text(json.dumps(data))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


@of(hf_sharded)
def a_shard_is_missing(folder):
    shard = first_shard(folder)
    shard.unlink()
    return shard.name, "model.embed_tokens.weight"


@of(hf_sharded)
def a_shard_that_nobody_knows(folder):
    (folder / "model-00099-of-00099.safetensors").write_bytes(first_shard(folder).read_bytes())
    return "model-00099-of-00099.safetensors", "index"


@of(hf_sharded)
def one_tensor_in_two_shards(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    state = {**load_file(shards[1]), "model.embed_tokens.weight": load_file(shards[0])["model.embed_tokens.weight"]}
    save_file(state, shards[1], {"format": "pt"})
    return "model.embed_tokens.weight", shards[0].name, shards[1].name


@of(hf_sharded)
def a_tensor_in_another_shard_than_the_index_says(folder):
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    edit_index(folder, lambda places: places.update({"model.embed_tokens.weight": last.name}))
    return "model.embed_tokens.weight", last.name


@of(hf_sharded)
def an_index_out_of_the_folder(folder):
    edit_index(folder, lambda places: places.update({"lm_head.weight": "../a/model.safetensors"}))
    return "../a/model.safetensors", "leads out"


@of(hf_sharded)
def an_index_to_the_root(folder):
    edit_index(folder, lambda places: places.update({"lm_head.weight": "/etc/passwd"}))
    return "/etc/passwd", "leads out"


@of(hf_sharded)
def an_index_to_the_folder_itself(folder):
    edit_index(folder, lambda places: places.update({"lm_head.weight": "."}))
    return ("leads out",)


@of(hf_sharded)
def an_index_of_numbers(folder):
    edit_index(folder, lambda places: places.update({"lm_head.weight": 3}))
    return (INDEX,)


@of(hf_sharded)
def an_index_without_its_map(folder):
    (folder / INDEX).write_text("{}")
    return INDEX, "weight_map"


@of(hf_sharded)
def no_index(folder):
    (folder / INDEX).unlink()
    return (INDEX,)


class Evil:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return exec, ("import tests.bad_checkpoints as b; b.Evil.ran = True",)


def parameter(folder: Path, name: str = "decoder.layers.0.mlp.linear_fc1.weight") -> Path:
    return folder / "global_step0" / "zero" / name


@of(universal)
def a_parameter_is_missing(folder):
    for file in parameter(folder).iterdir():
        file.unlink()
    return "linear_fc1", "fp32.pt"


@of(universal)
def a_parameter_too_many(folder):
    parameter(folder, "decoder.layers.9.mlp.linear_fc1.weight").mkdir()
    return ("decoder.layers.9.mlp.linear_fc1.weight",)


@of(universal)
def a_parameter_of_another_shape(folder):
    torch.save({"param": torch.ones(3, 48)}, parameter(folder) / "fp32.pt")
    return "linear_fc1", "(104, 48)", "(3, 48)"


@of(universal)
def a_parameter_of_integers(folder):
    torch.save({"param": torch.ones(104, 48, dtype=torch.int64)}, parameter(folder) / "fp32.pt")
    return ("linear_fc1",)


@of(universal)
def a_parameter_cut_off(folder):
    path = parameter(folder) / "fp32.pt"
    path.write_bytes(path.read_bytes()[:-300])
    return "linear_fc1", "fp32.pt"


@of(universal)
def a_parameter_that_runs_code(folder):
    torch.save({"param": Evil()}, parameter(folder) / "fp32.pt")
    return "linear_fc1", "could run code"


@of(universal)
def metadata_that_runs_code(folder):
    torch.save(Evil(), folder / "global_step0" / "mp_rank_00_model_states.pt")
    return "mp_rank_00_model_states.pt", "could run code"


@of(universal)
def some_moments_only(folder):
    (parameter(folder) / "exp_avg.pt").unlink()
    return "moments", "linear_fc1"


@of(universal)
def a_tag_out_of_the_folder(folder):
    (folder / "latest_universal").write_text("../../a")
    return ("latest_universal",)


@of(universal)
def no_sizes(folder):
    (folder / "dims.json").unlink()
    return ("config.json",)


@of(universal)
def sizes_of_no_model(folder):
    edit_json(folder / "dims.json", dims={"arch": "llama", "hiden_size": 3})
    return "hiden_size", "hidden_size"

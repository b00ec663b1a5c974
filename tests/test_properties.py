"""Property tests: any config, safetensors header or dataset index is either read correctly or refused."""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.shards import open_shards
from megatron_ligo.common.errors import CheckpointError, ConfigError, DataError, ErrorCollector
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.config.typed_toml import iterate_settings
from megatron_ligo.data.indexed_dataset import HEADER, MAGIC, TOKEN_TYPES, VERSION, open_indexed_files
from tests.tiny_models import llama_config

property_settings = settings(max_examples=60, deadline=None, derandomize=True, database=None)
KEYS = [key for key, _, _ in iterate_settings(RunConfig)]
NUMBERS = st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**400]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def nest(flat: dict[str, object]) -> dict:
    """Turns dotted keys into nested tables."""
    table: dict = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return table


@property_settings
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@example({"fit.lr": 10**400})
@example({"data.train": [10**400, "a"]})
def test_any_values_give_a_config_or_one_error(flat):
    try:
        config = RunConfig.from_dict(nest(flat))
    except ConfigError as error:
        assert all(problem.where and problem.expected for problem in error.problems)
        return
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@property_settings
@given(st.dictionaries(st.sampled_from([f.name for f in fields(ModelConfig)]), NUMBERS, min_size=1, max_size=2))
@example({"hidden_size": 2**64 + 1})
@example({"rotary_fraction": 1e308})
@example({"max_positions": 2**40})
@example({"attention_scale": float("inf")})
def test_any_sizes_give_a_model_or_one_error(changes):
    try:
        sizes = ModelConfig.from_json(llama_config().to_json() | changes)
    except ConfigError as error:
        assert all(problem.where for problem in error.problems)
        return
    largest = max(size for size in sizes.to_json().values() if isinstance(size, int))
    assert largest < 2**31 and 0 < sizes.num_rotated <= sizes.head_dim
    assert ModelConfig.from_json(sizes.to_json()) == sizes


@property_settings
@given(st.dictionaries(st.text(max_size=9) | st.sampled_from(["fit", "data", "operator"]), VALUES, max_size=3))
def test_any_tables_give_a_config_or_one_error(table):
    try:
        config = RunConfig.from_dict(table)
    except ConfigError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config


@property_settings
@given(st.text(max_size=60) | st.binary(max_size=60), st.sampled_from(KEYS), st.text(max_size=20))
def test_any_text_gives_a_config_or_one_error(tmp_path_factory, content, key, value):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for args in ((path,), (None, [f"{key}={value}"]), (None, [value])):
        try:
            RunConfig.load(*args)
        except ConfigError as error:
            assert str(error)


TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", ""]) | VALUES,
        "shape": st.lists(st.integers(0, 6) | NUMBERS, max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 40) | NUMBERS, min_size=2, max_size=2) | VALUES,
    },
)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> tuple[Path, dict, bytes]:
    """The path of a safetensors file, its header and its data."""
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    return path, json.loads(content[8 : 8 + size]), content[8 + size :]


@property_settings
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | VALUES, max_size=2),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_a_safetensors_header_is_correct_or_refused(tensors, changes, length):
    """Tensors that are read lie within the file and have the header's shape."""
    path, header, data = tensors
    for name, change in changes.items():
        old = header.get(name)
        header = header | {name: old | change if isinstance(old, dict) and isinstance(change, dict) else change}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    try:
        shards = open_shards(path.parent)
        values = {name: shards.tensor(name) for name in shards.names()}
    except CheckpointError:
        return
    if not shards.errors:
        for name, tensor in values.items():
            start, end = header[name]["data_offsets"]
            assert list(tensor.shape) == header[name]["shape"]
            assert tensor.numpy().tobytes() == data[start:end]


NARROW = st.integers(-2, 9)
WIDE = NARROW | st.sampled_from([2**31 - 1, 2**62, 2**63 - 1])


@property_settings
@given(
    st.sampled_from([*TOKEN_TYPES, 0, 6, 255]),
    st.integers(0, 4) | st.integers(0, 2**64 - 1),
    st.integers(0, 4) | st.integers(0, 2**64 - 1),
    st.lists(st.tuples(NARROW, WIDE), max_size=4),
    st.lists(WIDE, max_size=4),
    st.integers(0, 40),
)
@example(1, 0, 0, [], [], 0)
@example(1, 2, 2, [(4, 0), (4, 2**63 - 1)], [0, 2], 8)
def test_a_dataset_index_is_correct_or_refused(
    tmp_path_factory, code, sequences, boundaries, sequence_entries, ends, size
):
    """Every sequence of an accepted pair lies within its .bin file."""
    prefix = tmp_path_factory.getbasetemp() / "pair"
    lengths, pointers = [length for length, _ in sequence_entries], [pointer for _, pointer in sequence_entries]
    body = np.array(lengths, np.int32).tobytes() + np.array(pointers + ends, np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, VERSION, code, sequences, boundaries) + body)
    prefix.with_suffix(".bin").write_bytes(bytes(size))
    errors = ErrorCollector("data", DataError)
    pair = open_indexed_files(str(prefix), errors)
    assert (pair is None) == bool(errors.problems)
    if pair:
        itemsize = np.dtype(pair.dtype).itemsize
        assert pair.tokens == sum(lengths) and pair.bin_bytes == size
        assert all(0 <= pointer <= pointer + length * itemsize <= size for length, pointer in sequence_entries)

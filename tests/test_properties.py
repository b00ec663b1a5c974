"""Whatever stands in a config, in a safetensors file's head or in an index of data: it is read whole, or refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from megatron_ligo.checkpoint.formats.hf.shards import open_shards
from megatron_ligo.common.errors import CheckpointError, ConfigError, DataError, ErrorCollector
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.config.typed_toml import iterate_settings
from megatron_ligo.data.indexed_dataset import HEADER, MAGIC, TOKEN_TYPES, VERSION, open_indexed_files

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
KEYS = [key for key, _, _ in iterate_settings(RunConfig)]
NUMBERS = st.integers() | st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, 2**64, 10**400]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def nested(flat: dict[str, object]) -> dict:
    table: dict = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return table


@few
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@example({"fit.lr": 10**400})
@example({"data.train": [10**400, "a"]})
def test_values_are_a_config_or_one_error(flat):
    try:
        config = RunConfig.from_dict(nested(flat))
    except ConfigError as error:
        assert "expected" in str(error)
        return
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@few
@given(st.dictionaries(st.text(max_size=9) | st.sampled_from(["fit", "data", "operator"]), VALUES, max_size=3))
def test_tables_are_a_config_or_one_error(table):
    try:
        config = RunConfig.from_dict(table)
    except ConfigError:
        return
    assert RunConfig.from_dict(config.to_dict()) == config


@few
@given(st.text(max_size=60) | st.binary(max_size=60), st.sampled_from(KEYS), st.text(max_size=20))
def test_text_is_a_config_or_one_error(tmp_path_factory, content, key, value):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    for arguments in ((path,), (None, [f"{key}={value}"]), (None, [value])):
        try:
            RunConfig.load(*arguments)
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
    """A folder with model.safetensors, the table in its head, and the numbers behind."""
    path = tmp_path_factory.mktemp("tensors") / "model.safetensors"
    save_file(TENSORS, path)
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    return path, json.loads(content[8 : 8 + size]), content[8 + size :]


@few
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRY | VALUES, max_size=2),
    st.none() | st.integers(0, 2**64 - 1),
)
def test_a_head_of_tensors_tells_the_truth_or_is_refused(tensors, changes, length):
    """What is read lies in the file, and has the dtype and the shape that the head says."""
    path, table, numbers = tensors
    for name, change in changes.items():
        old = table.get(name)
        table = table | {name: old | change if isinstance(old, dict) and isinstance(change, dict) else change}
    head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + numbers)
    try:
        shards = open_shards(path.parent)
        found = {name: shards.tensor(name) for name in shards.names()}
    except CheckpointError:
        return
    if not shards.errors:
        for name, tensor in found.items():
            start, end = table[name]["data_offsets"]
            assert list(tensor.shape) == table[name]["shape"]
            assert tensor.numpy().tobytes() == numbers[start:end]


SMALL = st.integers(-2, 9)
WIDE = SMALL | st.sampled_from([2**31 - 1, 2**62, 2**63 - 1])


@few
@given(
    st.sampled_from([*TOKEN_TYPES, 0, 6, 255]),
    st.integers(0, 4) | st.integers(0, 2**64 - 1),
    st.integers(0, 4) | st.integers(0, 2**64 - 1),
    st.lists(st.tuples(SMALL, WIDE), max_size=4),
    st.lists(WIDE, max_size=4),
    st.integers(0, 40),
)
@example(1, 0, 0, [], [], 0)
@example(1, 2, 2, [(4, 0), (4, 2**63 - 1)], [0, 2], 8)
def test_an_index_of_data_tells_the_truth_or_is_refused(
    tmp_path_factory, code, sequences, boundaries, places, ends, size
):
    """Every sequence of a pair that is taken lies in its .bin."""
    prefix = tmp_path_factory.getbasetemp() / "pair"
    lengths, pointers = [length for length, _ in places], [pointer for _, pointer in places]
    body = np.array(lengths, np.int32).tobytes() + np.array(pointers + ends, np.int64).tobytes()
    prefix.with_suffix(".idx").write_bytes(HEADER.pack(MAGIC, VERSION, code, sequences, boundaries) + body)
    prefix.with_suffix(".bin").write_bytes(bytes(size))
    errors = ErrorCollector("data", DataError)
    pair = open_indexed_files(str(prefix), errors)
    assert (pair is None) == bool(errors.problems)
    if pair:
        item = np.dtype(pair.dtype).itemsize
        assert pair.tokens == sum(lengths) and pair.bin_bytes == size
        assert all(0 <= pointer <= pointer + length * item <= size for length, pointer in places)

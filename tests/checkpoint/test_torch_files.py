"""torch.save files are read as torch reads them, and damaged or ambiguous ones are refused with one error."""

from __future__ import annotations

import _codecs
import io
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from megatron_ligo.checkpoint.io import tensor_check, torch_files
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from tests.checkpoint.bad_checkpoints import torch_archives
from tests.checkpoint.bad_checkpoints.torch_archives import SHAPES, UNUSABLE, good_state

BYTES_OF_TEXT = b"\x80\xff" * 10


def read_all(path: Path, mapped: bool = True) -> object:
    """Reads a file, and compares the checksum of each tensor."""
    tree = torch_files.load(path, mapped=mapped)
    for name in SHAPES:
        torch_files.check_stored(name, tree[name])
    return tree


def refusal(path: Path, mapped: bool = True) -> str:
    with pytest.raises(CheckpointError) as error:
        read_all(path, mapped)
    assert len(error.value.problems) == 1
    return str(error.value)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("name", torch_archives.archives)
def test_damaged_archives(tmp_path, name, mapped):
    path = tmp_path / "file.pt"
    torch.save(good_state(), path)
    read_all(path, mapped)
    reason = torch_archives.archives[name](path)
    assert reason in refusal(path, mapped)


@pytest.mark.parametrize("name", torch_archives.legacy)
def test_damaged_files_of_old_torch(tmp_path, name):
    path = tmp_path / "file.pt"
    torch.save(good_state(), path, _use_new_zipfile_serialization=False)
    read_all(path)
    reason = torch_archives.legacy[name](path)
    assert reason in refusal(path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_tensors_that_are_not_plain(tmp_path, kind, is_zip):
    """All of a file are named in one error."""
    path = tmp_path / "file.pt"
    state = good_state()
    state["inner"] = {"x": [UNUSABLE[kind](state["a"])]}
    state["b"] = UNUSABLE[kind](state["b"])
    torch.save(state, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as error:
        torch_files.load(path)
    problems = error.value.problems
    assert [problem.where.partition(" ")[0] for problem in problems] == ["b", "inner.x.0"], problems
    assert {problem.expected for problem in problems} == {tensor_check.EXPECTED}


def plain_values() -> dict[str, object]:
    state = good_state()
    columns = torch.arange(24.0).view(4, 6)
    versions = OrderedDict(state)
    versions._metadata = OrderedDict(version=1)
    return {
        **state,
        "module": versions,
        "tied": state["a"],
        "transposed": state["a"].T,
        "columns": list(columns.chunk(3, dim=1)),
        "part": columns[1:3, 2:],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "empty part": columns[4:],
        "parameter": torch.nn.Parameter(state["c"]),
        "one row": torch.arange(6).expand(1, 6),
        "integers": [torch.arange(5, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)],
        "flags": torch.tensor([True, False]),
        "halves": [state["a"].half(), state["b"].bfloat16()],
        "values": [1, -(2**70), 2.5, None, True, "text", BYTES_OF_TEXT, (1, 2), {3}, 1j, bytearray(b"x")],
        "torch": [torch.Size([1, 2]), torch.float32, torch.device("cpu")],
    }  # fmt: skip


def assert_equal(a: object, b: object) -> None:
    if isinstance(b, torch.Tensor):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a, b.detach()) and not a.requires_grad
    elif isinstance(b, dict):
        assert list(a) == list(b)
        for key in b:
            assert_equal(a[key], b[key])
    elif isinstance(b, list):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b and type(a) is type(b)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 3}, {"pickle_protocol": 4}],
    ids=["zip", "old", "protocol 3", "protocol 4"],
)
def test_values_are_those_of_torch(tmp_path, options, mapped):
    path = tmp_path / "file.pt"
    torch.save(plain_values(), path, **options)
    assert_equal(read_all(path, mapped), torch.load(path, weights_only=False))


def test_an_archive_without_checksums(tmp_path):
    path = tmp_path / "file.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(good_state(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal(read_all(path), good_state())


def test_an_archive_that_zipfile_wrote_is_read_unaligned(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(good_state(), path)
    torch_archives.rewrite(path, lambda name, data: [(name, data)])
    assert_equal(read_all(path), good_state())
    content = bytearray(path.read_bytes())
    content[content.index(good_state()["b"].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)
    assert "record data/1: other bytes" in refusal(path)


@pytest.mark.parametrize("mapped", [True, False])
def test_numbers_of_another_byte_order(tmp_path, mapped):
    path = tmp_path / "file.pt"
    torch.save({name: torch.from_numpy(t.numpy().byteswap()) for name, t in good_state().items()}, path)
    torch_archives.rewrite(path, lambda name, data: [(name, b"big" if name.endswith("byteorder") else data)])
    assert_equal(read_all(path, mapped), good_state())


def test_changes_of_a_tensor_stay_out_of_the_file(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(good_state(), path)
    torch_files.load(path)["a"].fill_(7)
    assert_equal(torch_files.load(path), good_state())


class Call:
    """Pickles a call."""

    def __init__(self, function: object, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        Call(_codecs.encode, "a", "nope"),
        Call(_codecs.encode, "\u06dd" * 200_000, "idna"),
        Call(bytearray, 10**13),
        Call(torch._utils._rebuild_tensor_v2, torch.ones(1), 0, (1,), (1,), False, OrderedDict()),
        Call(torch.Tensor, 10**9),
        Call(torch.nn.Parameter, torch.ones(2)),
        Call(torch.load, "x"),
        Call(complex, "x"),
        Call(torch.device, "nowhere"),
    ],
    ids=[
        "no encoding",
        "a slow encoding",
        "zeros",
        "a rebuilt tensor",
        "a class",
        "a parameter",
        "load",
        "complex",
        "device",
    ],
)
def test_calls_that_fail_are_refused(tmp_path, call):
    path = tmp_path / "file.pt"
    torch.save({**good_state(), "x": call}, path)
    refusal(path)


def replace_pickle(path: Path, program: bytes) -> None:
    torch_archives.rewrite(path, lambda name, data: [(name, program if name.endswith("data.pkl") else data)])


@pytest.mark.parametrize("number", [2**70, 2**62, 2**33, -1, -(2**40)])
def test_storages_of_any_claimed_size(tmp_path, number):
    path = tmp_path / "file.pt"
    torch.save(good_state(), path)
    with zipfile.ZipFile(path) as archive:
        (program,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    replace_pickle(path, program.replace(b"K\x1e", pickle.dumps(number, 2)[2:-1]))
    refusal(path)


@pytest.mark.parametrize(
    "size, stride, offset", [((7, 5), (5, 1), 0), ((6, 5), (5, 1), 1), ((2,), (40,), 0), ((0,), (1,), 31)]
)
def test_tensors_beyond_their_storage(tmp_path, size, stride, offset):
    """torch enlarges a storage that it has read, by numbers that were never written."""
    path = tmp_path / "file.pt"
    for is_zip in (True, False):
        tensor = torch.ones(6, 5)

        class Beyond:
            def __reduce__(self, tensor=tensor):
                storage = torch.storage.TypedStorage(
                    wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True
                )
                return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

        torch.save({**good_state(), "x": Beyond()}, path, _use_new_zipfile_serialization=is_zip)
        for mapped in (True, False):
            assert "beyond its storage" in refusal(path, mapped)


def test_tensors_with_shared_numbers_are_found():
    matrix = torch.arange(24.0).view(4, 6)
    left, right = matrix.chunk(2, dim=1)
    cases = [
        ({"a": matrix[:2], "b": matrix[2:]}, [], []),
        ({"a": left, "b": right}, [], []),
        ({"a": matrix[:3], "b": matrix[2:]}, [], ["b"]),
        ({"a": left, "b": right, "c": matrix[3]}, [], ["c"]),
        ({"a": matrix, "b": matrix}, [], ["b"]),
        ({"a": matrix, "b": matrix}, [{"a", "b"}], []),
        ({"a": matrix, "b": matrix.T}, [{"a", "b"}], ["b"]),
        ({"a": matrix, "b": matrix, "c": matrix}, [{"a", "b"}], ["c"]),
        ({"a": matrix, "b": matrix.clone()}, [], []),
    ]
    for tensors, tied, expected in cases:
        errors = ErrorCollector("shared")
        tensor_check.check_own_bytes(tensors, tied, errors)
        assert [problem.where for problem in errors.problems] == expected, (tensors, tied)


def test_pickles_that_are_cut_off_or_claim_too_much(tmp_path):
    path = tmp_path / "file.pt"
    programs = [
        b"",
        b"\x80\x02}",
        b"\x80\x02}r\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02(lp0\nh\x00a.",
    ]
    programs += [
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    ]
    programs.append(b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b"\x00.")
    tracemalloc.start()
    for program in programs:
        torch.save(good_state(), path)
        replace_pickle(path, program)
        refusal(path)
        path.write_bytes(program)
        refusal(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 28, "what a pickle claims is not allocated before it is read"


def test_an_archive_within_a_file(tmp_path):
    path, archive = tmp_path / "file", io.BytesIO()
    torch.save(good_state()["a"], archive)
    content = archive.getvalue()
    path.write_bytes(bytes(128) + content + bytes(50))
    assert_equal(torch_files.map_tensor(path, 128, len(content)), good_state()["a"])
    for start, length in ((129, len(content)), (128, len(content) + 50), (128, len(content) - 1), (0, 64), (0, 0)):
        with pytest.raises(CheckpointError):
            torch_files.map_tensor(path, start, length)
    changed = bytearray(path.read_bytes())
    changed[128 + content.index(good_state()["a"].numpy().tobytes())] ^= 1
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="checksum"):
        torch_files.map_tensor(path, 128, len(content))


def test_many_mapped_files_keep_none_open(tmp_path):
    def count_open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, trees = count_open_files(), []
    for number in range(5):
        torch.save(good_state(), tmp_path / f"{number}.pt")
        trees.append(torch_files.load(tmp_path / f"{number}.pt"))
    assert count_open_files() == before and len(trees) == 5

"""Files written tensor by tensor can be read by the libraries, and complete tensors are not written resumed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megatron_ligo.checkpoint.io import file_layout
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.common.recent_values import RecentValues


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(7, 3).T,
        "slice": torch.randn(100)[10:20],
        "double": torch.randn(3, dtype=torch.float64),
        "integers": torch.arange(5),
    }


def test_torch_files_are_complete_archives(tmp_path):
    tensors = mixed_tensors()
    tree = {"module": {name: lazy(tensor) for name, tensor in tensors.items()}, "list": [1, "a", None, (2.5, True)]}
    with Output(tmp_path) as output:
        output.write_torch("deep/file.pt", tree)
    path = tmp_path / "deep" / "file.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mapped in (False, True):
        read = torch.load(path, weights_only=True, mmap=mapped)
        assert read["list"] == tree["list"]
        for name, tensor in tensors.items():
            assert torch.equal(read["module"][name], tensor), name
            assert read["module"][name].dtype == tensor.dtype
    assert sorted(file.name for file in path.parent.iterdir()) == ["file.pt"]


def similar_trees() -> list[object]:
    """Trees that differ from another one in one thing that an equality of Python may not see."""
    first, second = torch.arange(6.0), torch.arange(6.0) + 1
    shared = lazy(first)
    plain = [1, True, 1.0, 0.0, -0.0, "1", b"1", None, float("nan"), {1: 2}, {True: 2}, {"a": 1, "b": 2}]
    plain += [{"b": 2, "a": 1}, [1, 2], (1, 2), torch.Size([1, 2]), torch.float32, torch.float64]
    trees = [{"param": lazy(first), "value": value} for value in plain]
    for tensor in (second, first.view(2, 3), first.half(), first.double(), torch.empty(0), torch.tensor(1.0)):
        trees.append({"param": lazy(tensor), "value": 1})
    trees += [[shared, shared], [lazy(first), lazy(first)], [lazy(first), lazy(second)], (shared, shared), shared]
    return trees


def make_tensors(tree: object) -> object:
    """Returns the tree with its tensors, those that occur twice shared."""
    tensors = {}

    def replace(node: object) -> object:
        if isinstance(node, LazyTensor):
            return tensors.setdefault(id(node), node.make().clone())
        if isinstance(node, dict):
            return {key: replace(value) for key, value in node.items()}
        return type(node)(map(replace, node)) if isinstance(node, list | tuple) else node

    return replace(tree)


def test_a_kept_skeleton_is_that_of_its_tree_alone(tmp_path, monkeypatch):
    """Written twice, the second time in another order and with every skeleton a kept one; and without any kept."""
    trees = similar_trees()
    with Output(tmp_path) as output:
        for name, order in (("first", trees), ("second", trees[::-1]), ("alone", trees)):
            for tree in order:
                if name == "alone":
                    monkeypatch.setattr(file_layout, "_recent_skeletons", RecentValues(1, 0))
                output.write_torch(f"{name}/{id(tree)}/file.pt", tree)
    for tree in trees:
        files = [tmp_path / name / f"{id(tree)}/file.pt" for name in ("first", "second", "alone")]
        assert len({file.read_bytes() for file in files}) == 1, tree
        loaded = torch.load(files[1], weights_only=True)
        assert describe(loaded) == describe(make_tensors(tree)), tree


def describe(tree: object) -> str:
    """Returns a tree as text, with the types, tensors' dtypes and numbers, and which of them share storage."""
    storages = []

    def as_text(node: object) -> str:
        if isinstance(node, torch.Tensor):
            storages.append(node.untyped_storage().data_ptr())
            return f"{node.dtype} {tuple(node.shape)} {node.tolist()} {storages.index(storages[-1])}"
        if isinstance(node, dict):
            return f"{{{', '.join(f'{key!r}: {as_text(value)}' for key, value in node.items())}}}"
        if isinstance(node, list | tuple):
            return f"{type(node)}({', '.join(map(as_text, node))})"
        return repr(node)

    return as_text(tree)


def test_zeros_are_a_hole(tmp_path):
    with Output(tmp_path) as output:
        output.write_torch("zeros.pt", {"param": LazyTensor((1000, 1000), torch.float32, None)})
    path = tmp_path / "zeros.pt"
    assert path.stat().st_blocks * 512 < 100_000 < path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.equal(torch.load(path)["param"], torch.zeros(1000, 1000))


def test_safetensors_of_mixed_dtypes(tmp_path):
    tensors = mixed_tensors()
    with Output(tmp_path) as output:
        output.write_safetensors(
            "model.safetensors", {name: lazy(tensor) for name, tensor in tensors.items()}, {"format": "pt"}
        )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_complete_tensors_are_not_computed_again(tmp_path):
    computed: list[str] = []

    def recorded(name: str, tensor: torch.Tensor) -> LazyTensor:
        def make() -> torch.Tensor:
            computed.append(name)
            return tensor

        return LazyTensor(tuple(tensor.shape), tensor.dtype, make)

    tensors = mixed_tensors()
    (tmp_path / "content").mkdir()
    path = tmp_path / "content" / "file.pt"
    for _ in range(2):
        journal = Journal(tmp_path / "journal")
        with Output(tmp_path / "content", journal) as output:
            output.write_torch("file.pt", {name: recorded(name, tensor) for name, tensor in tensors.items()})
        journal.close()
    assert sorted(computed) == sorted(tensors)
    before = path.read_bytes()
    # The journal's digests are compared with the bytes on the disk, and the skeleton with the rest of the file.
    for at in (3, len(before) - 3):
        path.write_bytes(before[:at] + b"x" + before[at + 1 :])
        computed.clear()
        with Output(tmp_path / "content", Journal(tmp_path / "journal")) as output:
            output.write_torch("file.pt", {name: recorded(name, tensor) for name, tensor in tensors.items()})
        assert path.read_bytes() == before
        assert len(computed) > 3
    computed.clear()
    at = before.index(tensors["double"].numpy().tobytes())
    path.write_bytes(before[:at] + b"x" + before[at + 1 :])
    with Output(tmp_path / "content", Journal(tmp_path / "journal")) as output:
        output.write_torch("file.pt", {name: recorded(name, tensor) for name, tensor in tensors.items()})
    assert computed == ["double"]
    assert path.read_bytes() == before


def test_a_truncated_journal_resumes_after_its_last_complete_line(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for number in range(3):
        journal.add("wrote", "file", str(number), value=number)
    journal.close()
    complete = path.read_bytes()
    path.write_bytes(complete[:-5])
    resumed = Journal(path)
    assert resumed.get("wrote", "file", "1") == 1
    assert resumed.get("wrote", "file", "2") is None
    resumed.add("wrote", "file", "2", value=2)
    resumed.close()
    assert path.read_bytes() == complete


def fail() -> torch.Tensor:
    raise CheckpointError("damaged")


def count_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_output_closes_its_files(tmp_path, workers):
    tensors = {name: lazy(tensor) for name, tensor in mixed_tensors().items()}
    bad = {**tensors, "bad": LazyTensor((3,), torch.float32, fail)}
    before = count_open_files()
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(CheckpointError), Output(folder, workers=workers) as output:
            output.write_torch("first.pt", tensors)
            output.write_torch_files({f"{name}.pt": bad for name in "abc"})
    assert count_open_files() == before

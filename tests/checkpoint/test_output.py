"""Files of tensors written piece by piece are the ones that the libraries write."""

from __future__ import annotations

import zipfile

import torch
from safetensors import safe_open

from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.output import Output


def later(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(7, 3).T,
        "part": torch.randn(100)[10:20],
        "double": torch.randn(3, dtype=torch.float64),
        "count": torch.arange(5),
    }


def test_torch_files_are_whole_archives(tmp_path):
    tensors = some_tensors()
    tree = {"module": {name: later(tensor) for name, tensor in tensors.items()}, "list": [1, "a", None, (2.5, True)]}
    with Output(tmp_path) as out:
        out.write_torch("deep/file.pt", tree)
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


def test_zeros_are_a_hole(tmp_path):
    with Output(tmp_path) as out:
        out.write_torch("zeros.pt", {"param": LazyTensor((1000, 1000), torch.float32, None)})
    path = tmp_path / "zeros.pt"
    assert path.stat().st_blocks * 512 < 100_000 < path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.equal(torch.load(path)["param"], torch.zeros(1000, 1000))


def test_safetensors_of_mixed_dtypes(tmp_path):
    tensors = some_tensors()
    with Output(tmp_path) as out:
        out.write_safetensors(
            "model.safetensors", {name: later(tensor) for name, tensor in tensors.items()}, {"format": "pt"}
        )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_what_is_whole_is_not_made_again(tmp_path):
    made: list[str] = []

    def noted(name: str, tensor: torch.Tensor) -> LazyTensor:
        def make() -> torch.Tensor:
            made.append(name)
            return tensor

        return LazyTensor(tuple(tensor.shape), tensor.dtype, make)

    tensors = some_tensors()
    (tmp_path / "content").mkdir()
    path = tmp_path / "content" / "file.pt"
    for _ in range(2):
        journal = Journal(tmp_path / "journal")
        with Output(tmp_path / "content", journal) as out:
            out.write_torch("file.pt", {name: noted(name, tensor) for name, tensor in tensors.items()})
        journal.close()
    assert sorted(made) == sorted(tensors)
    before = path.read_bytes()
    # What the journal promises is held against the bytes on the disk, and so is what stands around the tensors.
    for at in (3, len(before) - 3):
        path.write_bytes(before[:at] + b"x" + before[at + 1 :])
        made.clear()
        with Output(tmp_path / "content", Journal(tmp_path / "journal")) as out:
            out.write_torch("file.pt", {name: noted(name, tensor) for name, tensor in tensors.items()})
        assert path.read_bytes() == before
        assert len(made) > 3
    made.clear()
    at = before.index(tensors["double"].numpy().tobytes())
    path.write_bytes(before[:at] + b"x" + before[at + 1 :])
    with Output(tmp_path / "content", Journal(tmp_path / "journal")) as out:
        out.write_torch("file.pt", {name: noted(name, tensor) for name, tensor in tensors.items()})
    assert made == ["double"]
    assert path.read_bytes() == before


def test_a_journal_cut_off_in_a_line_goes_on_from_the_line_before(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    for number in range(3):
        journal.add("wrote", "file", str(number), value=number)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = Journal(path)
    assert again.get("wrote", "file", "1") == 1
    assert again.get("wrote", "file", "2") is None
    again.add("wrote", "file", "2", value=2)
    again.close()
    assert path.read_bytes() == whole

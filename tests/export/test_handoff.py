"""The hand-off's folder: one model in each format, its record, and a second run."""

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_ligo.arch import get
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.checkpoint.reader import WEIGHT
from megatron_ligo.common.errors import CheckpointError, ConfigError, LigoError
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.config.run_config import HandoffSection, LargeSection, OperatorSection, RunConfig
from megatron_ligo.distributed import mesh
from megatron_ligo.export import handoff, provenance
from megatron_ligo.export.grown_reader import GrownReader, digest_weights
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_from, hf_llama, llama_dims, tokens

LARGE = LargeSection(num_layers=4, hidden_size=30, ffn_size=40, num_heads=10, num_kv_heads=5)


@pytest.fixture
def grown(tmp_path):
    hf_llama(llama_dims(tied=True)).save_pretrained(tmp_path / "small")
    source = HfReader(tmp_path / "small")
    return GrownReader(build_initial_operator(source.model_config, LARGE, OperatorSection()), source)


def write(grown, folder, **more):
    section = HandoffSection()
    return handoff.write_handoff(grown, folder, None, section.formats, handoff.build_growth_record(grown), **more)


def test_both_formats_hold_the_grown_model(grown, tmp_path):
    record = write(grown, tmp_path / "out")
    assert record == json.loads((tmp_path / "out/growth.json").read_text()) == provenance.read(tmp_path / "out")
    for name in ("universal", "hf"):
        reader = formats.open(tmp_path / "out" / name)
        assert reader.model_config == grown.model_config
        for key in get("llama").keys(grown.model_config):
            assert torch.equal(reader.read(key), grown.read(key)), (name, key)
    ids = tokens(grown.model_config)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out/hf")
    assert torch.allclose(loaded(ids).logits, hf_from(grown)(ids).logits, atol=2e-6)


def test_record_says_where_it_comes_from(grown, tmp_path):
    record = write(grown, tmp_path / "out")
    assert record["small"] == grown.source.model_config.to_json()
    assert record["large"] == grown.model_config.to_json()
    assert record["source"]["digest"] == digest_weights(grown.source)
    assert record["operator"]["settings"]["width_init"] == "lossless"
    assert record["fit"] is None
    assert {"torch", "megatron_ligo"} <= set(record["versions"])
    assert str(tmp_path) not in json.dumps(record)


def test_a_second_run_leaves_all_as_it_is(grown, tmp_path):
    write(grown, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}
    write(grown, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}


def test_another_model_is_not_written_over_it(grown, tmp_path):
    write(grown, tmp_path / "out")
    other = GrownReader(
        build_initial_operator(grown.source.model_config, LARGE, OperatorSection(width_init="copy")), grown.source
    )
    with pytest.raises(ConfigError, match="found another operator"):
        write(other, tmp_path / "out")
    with exclusive_access(tmp_path / "out"), pytest.raises(ConfigError, match="a folder that no other run writes to"):
        write(grown, tmp_path / "out")
    write(other, tmp_path / "out", overwrite=True)
    reader = formats.open(tmp_path / "out/hf")
    assert torch.equal(reader.read("embed"), other.read("embed"))


def test_from_a_config(grown, tmp_path):
    sets = [f"small.path={grown.source.path}", "handoff.dtype=bf16"]
    sets += [f"large.{name}={value}" for name, value in vars(LARGE).items() if value]
    handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "out")
    half, whole = (formats.open(tmp_path / "out" / name).read("layers.0.q") for name in ("hf", "universal"))
    assert half.dtype == torch.bfloat16
    assert torch.equal(whole, grown.read("layers.0.q"))
    assert torch.equal(half, whole.bfloat16())
    with pytest.raises(ConfigError, match=r"small\.path"):
        handoff.grow_from_config(RunConfig(), None, tmp_path / "none")


def test_moments_grow_into_the_hand_off(grown, tmp_path):
    """From a universal checkpoint that has them; what became of them is in the record."""
    convert(grown.source, tmp_path / "trained", "universal")
    for file in (tmp_path / "trained").rglob("exp_avg*.pt"):
        held = torch.load(file)
        torch.save({**held, "param": torch.rand(held["param"].shape)}, file)
    sets = [f"small.path={tmp_path / 'trained'}", "handoff.moments=grow", "handoff.formats=['universal']"]
    sets += [f"large.{name}={value}" for name, value in vars(LARGE).items() if value]
    record = handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "out")
    assert record["moments"]["policy"] == "grow" and record["moments"]["layers_at_zero"] == [1]
    assert "exact" in record["moments"]["exp_avg_sq"] and not record["moments"]["maps_with_several_entries"]
    reader = formats.open(tmp_path / "out/universal")
    again = GrownReader(grown.operator, formats.open(tmp_path / "trained"), "grow")
    for key in ("embed", "layers.0.down", "layers.2.k", "layers.1.up", "final_norm"):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read(key, kind), again.read(key, kind))
    assert bool(reader.read("layers.0.down", "exp_avg").any()) and not reader.read("layers.1.down", "exp_avg").any()
    with pytest.raises(CheckpointError, match="expected moments"):
        sets[0] = f"small.path={grown.source.path}"
        handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "none")


def test_a_record_that_cannot_be_read_is_refused(tmp_path):
    assert provenance.read(tmp_path) is None
    for text in ("{", "[]", '{"version": 99}'):
        (tmp_path / "growth.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"growth\.json"):
            provenance.read(tmp_path)


# And with which of its tensors a rank meets it.
FAULTS = {
    "a mistake": (RuntimeError("as asked for"), 2),
    "a fault": (CheckpointError("a: expected b, found c."), 2),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), 12),
}


def grow_together(small: str, folder: str, fault: str = "", fails_on: int = 1) -> list:
    """One rank's share; how many tensors each has made, or what each raises. Rank fails_on meets that fault."""
    source = HfReader(Path(small))
    grown = GrownReader(
        build_initial_operator(source.model_config, LARGE, OperatorSection(width_init="random")), source
    )
    read, made = grown.read, []
    error, at = FAULTS[fault] if fault and dist.get_rank() == fails_on else (None, 0)

    def noted(key, kind=WEIGHT):
        made.append(key)
        if len(made) == at:
            raise error
        return read(key, kind)

    grown.read = noted
    ranks = mesh.all_ranks()
    try:
        handoff.write_handoff(grown, folder, None, ("universal", "hf"), {}, ranks=ranks)
    except LigoError as error:
        return ranks.all_gather((type(error).__name__, f"{error}", error.agreed))
    return ranks.all_gather(len(made))


def contents(folder: Path) -> dict[str, bytes]:
    """All bytes, but for what manifests say of where a conversion came from and when."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in ("hf/manifest.json", "universal/manifest.json"):
        found[name] = {**json.loads(found[name]), "job": None, "source": None}
    return found


def test_processes_share_the_work_and_write_the_same_bytes(grown, tmp_path, pools):
    small, whole, shared = str(grown.source.path), tmp_path / "whole", tmp_path / "shared"
    other = GrownReader(
        build_initial_operator(grown.source.model_config, LARGE, OperatorSection(width_init="random")), grown.source
    )
    handoff.write_handoff(other, whole, None, ("universal", "hf"), {})
    # One fails: what all have done is there for whoever goes on, however many they are.
    with pytest.raises(RuntimeError, match="as asked for"):
        pools(2).run(grow_together, small=small, folder=str(shared), fault="a mistake")
    assert not (shared / "universal").exists()
    # What a machine fails at leaves what is whole; a fault of the input leaves nothing; all say the same.
    full = "rank 1: x: expected free space on the disk, found it full. Free some, or choose another --output."
    kept = ("a full disk", ("MachineError", full, True), [".universal.partial"])
    refused = ("a fault", ("CheckpointError", "rank 1: a: expected b, found c.", True), [])
    for fault, told, left in (refused, kept):
        assert pools(2).run(grow_together, small=small, folder=str(shared), fault=fault) == [told, told]
        assert [path.name for path in shared.iterdir()] == left
    made = pools(4).run(grow_together, small=small, folder=str(shared))
    keys = len(list(grown.keys()))
    assert min(made) > 0 and max(made) < keys / 2 and sum(made) < keys
    assert contents(shared) == contents(whole)
    assert sorted(path.name for path in shared.iterdir()) == ["growth.json", "hf", "universal"]
    assert not [path for path in shared.rglob("*") if path.is_dir() and not any(path.iterdir())]

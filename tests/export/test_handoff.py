"""The hand-off: one model in several formats, its record, repeated and shared runs."""

import errno
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_ligo.arch import get
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.content import digest_weights
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.checkpoint.reader import WEIGHT
from megatron_ligo.common.errors import CheckpointError, ConfigError, LigoError, Problem, user_message
from megatron_ligo.common.file_digest import SEAL
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.config.run_config import HandoffSection, LargeSection, OperatorSection, RunConfig
from megatron_ligo.distributed import mesh
from megatron_ligo.export import handoff, provenance
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.operator_file import write_operator
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_from, hf_llama, llama_config, tokens

LARGE = LargeSection(num_layers=4, hidden_size=30, ffn_size=40, num_heads=10, num_kv_heads=5)


@pytest.fixture
def grown(tmp_path):
    hf_llama(llama_config(tied=True)).save_pretrained(tmp_path / "small")
    source = HfReader(tmp_path / "small")
    return GrownReader(build_initial_operator(source.model_config, LARGE, OperatorSection()), source)


def write(grown, folder, **options):
    section = HandoffSection()
    return handoff.write_handoff(grown, folder, None, section.formats, handoff.build_growth_record(grown), **options)


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


def test_the_record_identifies_the_source_and_the_operator(grown, tmp_path):
    record = write(grown, tmp_path / "out")
    assert record["small"] == grown.source.model_config.to_json()
    assert record["large"] == grown.model_config.to_json()
    assert record["source"]["digest"] == digest_weights(grown.source)
    assert record["operator"]["settings"]["width_init"] == "lossless"
    assert record["fit"] is None
    assert {"torch", "megatron_ligo"} <= set(record["versions"])
    assert str(tmp_path) not in json.dumps(record)


def test_a_second_run_changes_nothing(grown, tmp_path):
    write(grown, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}
    write(grown, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}


def test_another_model_does_not_overwrite_a_hand_off(grown, tmp_path):
    write(grown, tmp_path / "out")
    other = GrownReader(
        build_initial_operator(grown.source.model_config, LARGE, OperatorSection(width_init="copy")), grown.source
    )
    with pytest.raises(ConfigError) as error:
        write(other, tmp_path / "out")
    assert error.value.problems[0].where == str(tmp_path / "out") and "operator" in error.value.problems[0].found
    with exclusive_access(tmp_path / "out"), pytest.raises(ConfigError) as error:
        write(grown, tmp_path / "out")
    assert error.value.problems[0].where == str(tmp_path / "out") and "operator" not in error.value.problems[0].found
    write(other, tmp_path / "out", overwrite=True)
    reader = formats.open(tmp_path / "out/hf")
    assert torch.equal(reader.read("embed"), other.read("embed"))


def test_growth_from_a_config(grown, tmp_path):
    sets = [f"small.path={grown.source.path}", "handoff.dtype=bf16"]
    sets += [f"large.{name}={value}" for name, value in vars(LARGE).items() if value]
    handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "out")
    bf16, fp32 = (formats.open(tmp_path / "out" / name).read("layers.0.q") for name in ("hf", "universal"))
    assert bf16.dtype == torch.bfloat16
    assert torch.equal(fp32, grown.read("layers.0.q"))
    assert torch.equal(bf16, fp32.bfloat16())
    with pytest.raises(ConfigError) as error:
        handoff.grow_from_config(RunConfig(), None, tmp_path / "none")
    assert error.value.problems[0].where == "small.path"


@pytest.mark.parametrize("setting", ["operator.method=lossless", "operator.seed=1234"])
def test_a_stated_default_is_compared_with_the_operator(grown, tmp_path, setting):
    """A section that states only defaults asks for them; one that states nothing asks for nothing."""
    stack = build_initial_operator(grown.source.model_config, LARGE, OperatorSection(method="noisy_stack"))
    write_operator(stack, ((name, stack.tensor(name)) for name in stack.shapes()), tmp_path / "operator", {})
    silent, stated = (RunConfig.load(None, [f"small.path={grown.source.path}", *sets]) for sets in ([], [setting]))
    with pytest.raises(CheckpointError, match=r"operator\.method: expected the operator's 'noisy_stack'"):
        handoff.grow_from_config(stated, tmp_path / "operator", tmp_path / "out")
    handoff.grow_from_config(silent, tmp_path / "operator", tmp_path / "out")
    assert silent == stated and not silent.states("operator") and "stated" not in stated.to_dict()


def test_moments_grow_into_the_hand_off(grown, tmp_path):
    """Adam's moments of a universal checkpoint are grown, and the record says how."""
    convert(grown.source, tmp_path / "trained", "universal")
    for file in (tmp_path / "trained").rglob("exp_avg*.pt"):
        content = torch.load(file)
        torch.save({**content, "param": torch.rand(content["param"].shape)}, file)
    sets = [f"small.path={tmp_path / 'trained'}", "handoff.moments=grow", "handoff.formats=['universal']"]
    sets += [f"large.{name}={value}" for name, value in vars(LARGE).items() if value]
    record = handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "out")
    assert record["moments"]["policy"] == "grow" and record["moments"]["layers_at_zero"] == [1]
    assert "exact" in record["moments"]["exp_avg_sq"] and not record["moments"]["maps_with_several_entries"]
    reader = formats.open(tmp_path / "out/universal")
    expected = GrownReader(grown.operator, formats.open(tmp_path / "trained"), "grow")
    for key in ("embed", "layers.0.down", "layers.2.k", "layers.1.up", "final_norm"):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(reader.read(key, kind), expected.read(key, kind))
    assert bool(reader.read("layers.0.down", "exp_avg").any()) and not reader.read("layers.1.down", "exp_avg").any()
    sets[0] = f"small.path={grown.source.path}"
    with pytest.raises(CheckpointError) as error:
        handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "none")
    assert error.value.problems[0].where == str(grown.source.path) and "moments" in error.value.problems[0].expected


def test_an_invalid_record_is_refused(tmp_path):
    assert provenance.read(tmp_path) is None
    for text in ("{", "[]", '{"version": 99}'):
        (tmp_path / "growth.json").write_text(text)
        with pytest.raises(CheckpointError) as error:
            provenance.read(tmp_path)
        assert error.value.problems[0].where == str(tmp_path / "growth.json")


# The errors that a rank meets, and at which of its tensors.
FAULTS = {
    "bug": (RuntimeError("injected"), 2),
    "bad input": (CheckpointError(Problem("a", "b", "c")), 2),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "x"), 12),
}


RANDOM = {"width_init": "random"}


def grow_together(small: str, folder: str, fault: str = "", failing_rank: int = 1, keys: dict = RANDOM) -> list:
    """Grows as one of several ranks. Returns, for each rank, the number of tensors it computed or the error it raised.

    fault: the error that `failing_rank` meets.
    """
    source = HfReader(Path(small))
    grown = GrownReader(build_initial_operator(source.model_config, LARGE, OperatorSection(**keys)), source)
    read, keys_read = grown.read, []
    fault_error, fault_at = FAULTS[fault] if fault and dist.get_rank() == failing_rank else (None, 0)

    def recorded_read(key, kind=WEIGHT):
        keys_read.append(key)
        if len(keys_read) == fault_at:
            raise fault_error
        return read(key, kind)

    grown.read = recorded_read
    ranks = mesh.all_ranks()
    try:
        handoff.write_handoff(grown, folder, None, ("universal", "hf"), {}, ranks=ranks)
    except LigoError as error:
        return ranks.all_gather((type(error).__name__, f"{error}", error.agreed))
    return ranks.all_gather(len(keys_read))


def read_contents(folder: Path) -> dict[str, bytes]:
    """All bytes, without the manifests' own digest and entries for the conversion's source and job."""
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in ("hf/manifest.json", "universal/manifest.json"):
        contents[name] = {**json.loads(contents[name]), "job": None, "source": None, SEAL: None}
    return contents


def test_ranks_share_the_work_and_write_the_same_bytes(grown, tmp_path, pools):
    small, single, shared = str(grown.source.path), tmp_path / "single", tmp_path / "shared"
    random_operator = build_initial_operator(grown.source.model_config, LARGE, OperatorSection(**RANDOM))
    handoff.write_handoff(GrownReader(random_operator, grown.source), single, None, ("universal", "hf"), {})
    # A bug on one rank: finished tensors stay for the next run, with any number of ranks.
    with pytest.raises(RuntimeError, match="injected"):
        pools(2).run(grow_together, small=small, folder=str(shared), fault="bug")
    assert not (shared / "universal").exists()
    # Bad input leaves nothing, a machine's failure keeps the finished tensors, and all ranks raise the same error.
    for fault, error_type, remaining in (
        ("bad input", "CheckpointError", []),
        ("full disk", "MachineError", [".universal.partial"]),
    ):
        message = f"rank 1: {user_message(FAULTS[fault][0])}"
        errors = pools(2).run(grow_together, small=small, folder=str(shared), fault=fault)
        assert errors == [(error_type, message, True)] * 2
        assert [path.name for path in shared.iterdir()] == remaining
    counts = pools(4).run(grow_together, small=small, folder=str(shared))
    num_keys = len(list(grown.keys()))
    assert min(counts) > 0 and max(counts) < num_keys / 2 and sum(counts) < num_keys
    assert read_contents(shared) == read_contents(single)
    assert sorted(path.name for path in shared.iterdir()) == ["growth.json", "hf", "universal"]
    assert not [path for path in shared.rglob("*") if path.is_dir() and not any(path.iterdir())]


def test_two_processes_write_the_bytes_of_one_corner(grown, tmp_path, pools):
    keys = {"method": "corner"}
    operator = build_initial_operator(grown.source.model_config, LARGE, OperatorSection(**keys))
    handoff.write_handoff(GrownReader(operator, grown.source), tmp_path / "single", None, ("universal", "hf"), {})
    pools(2).run(grow_together, small=str(grown.source.path), folder=str(tmp_path / "shared"), keys=keys)
    assert read_contents(tmp_path / "shared") == read_contents(tmp_path / "single")

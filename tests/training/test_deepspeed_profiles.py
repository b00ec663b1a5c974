"""DeepSpeed takes each profile, key by key, and trains with it in two real processes."""

import json
from pathlib import Path

import deepspeed
import pytest

from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector
from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, RunInputs
from megatron_ligo.training.deepspeed_profile import (
    ACCUMULATION,
    BOUND,
    HARMLESS,
    KEYS_OF_SECTION,
    SUMS,
    bound_values,
    check_against_section,
    read_profile,
)

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "ds_configs").glob("*.json"))
BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "bf16",
    "fp16",
)


def train(profile: str) -> list[float]:
    """Losses over both ranks of a few steps with a profile."""
    import deepspeed
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
    config = {
        **json.loads(Path(profile).read_text()),
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for _ in range(4):
        rows = torch.arange(32.0).view(4, 8)[2 * engine.global_rank : 2 * engine.global_rank + 2] / 32
        loss = engine(rows).square().mean()
        engine.backward(loss)
        engine.step()
        torch.distributed.all_reduce(loss := loss.detach())
        losses.append(loss.item() / 2)
    return losses


def test_there_is_a_profile_for_each_stage():
    assert {path.stem for path in PROFILES} == {"zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_only_known_zero_keys(path):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    profile = json.loads(path.read_text())
    names = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias)}
    assert set(profile["zero_optimization"]) <= names
    assert not set(BATCH) & set(profile)
    assert DeepSpeedZeroConfig(**profile["zero_optimization"]).stage == int(path.stem.removesuffix("_offload")[-1])


def test_all_profiles_train_alike(pools):
    losses = {path.stem: pools(2).run(train, profile=str(path)) for path in PROFILES}
    assert losses["zero1"][-1] < losses["zero1"][0]
    for name, result in losses.items():
        assert result == pytest.approx(losses["zero1"], rel=1e-5), name


def write_profile(folder: Path, **keys: object) -> ParallelSection:
    zero = {"stage": 1, **keys.pop("zero_optimization", {})}
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": zero, **keys}))
    return ParallelSection(ds_config=f"{folder / 'zero.json'}")


def test_keys_that_change_what_is_computed_are_refused_together(tmp_path):
    """Features that are off pass, and so does what says `auto` where the run's own config decides."""
    wrong = {
        "fp16": {"enabled": True},
        "optimizer": {"type": "Adam"},
        "gradient_accumulation_steps": 4,
        "prescale_gradients": True,
        "progressive_layer_drop": {"enabled": True, "theta": 0.5},
        "a_key_of_next_year": 3,
    }
    zero = {"zero_quantized_nontrainable_weights": True, "zenflow": {"topk_ratio": 0.1}}
    with pytest.raises(ConfigError) as caught:
        read_profile(write_profile(tmp_path, zero_optimization=zero, **wrong))
    places = {problem.where for problem in caught.value.problems}
    assert places == {*wrong, *(f"zero_optimization.{key}" for key in zero)}
    off = {"fp16": {"enabled": False, "loss_scale": 0}, "optimizer": None, "gradient_accumulation_steps": "auto"}
    off |= {"wall_clock_breakdown": True, "train_batch_size": "auto", "prescale_gradients": False}
    assert set(read_profile(write_profile(tmp_path, **off))) == {"zero_optimization", *off}


def test_what_the_runs_config_sets_must_agree():
    section = PretrainSection(clip=1.0, global_batch_size=8, micro_batch_size=2)
    for profile, wrong in (
        ({"gradient_clipping": 1, "train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"}, []),
        ({"gradient_clipping": 0.5, "train_batch_size": 16}, ["gradient_clipping", "train_batch_size"]),
    ):
        errors = ErrorCollector("profile", ConfigError)
        check_against_section(profile, section, errors)
        assert sorted(problem.where for problem in errors.problems) == wrong


def test_every_known_key_is_deepspeeds(tmp_path):
    """What is allowed is read by DeepSpeed under this name: none of the table's keys is a slip of the pen."""
    source = "".join(path.read_text() for path in Path(deepspeed.runtime.__path__[0]).rglob("*.py"))
    source += "".join(path.read_text() for path in (Path(deepspeed.__path__[0]) / "monitor").rglob("*.py"))
    source += "".join(path.read_text() for path in (Path(deepspeed.__path__[0]) / "profiling").rglob("*.py"))
    source += "".join(path.read_text() for path in (Path(deepspeed.__path__[0]) / "comm").rglob("*.py"))
    names = {*HARMLESS, *BOUND, *KEYS_OF_SECTION, SUMS, ACCUMULATION}
    assert sorted(name for name in names if name not in source) == []


def test_a_run_keeps_the_values_that_change_its_numbers(tmp_path):
    parallel = write_profile(tmp_path, bf16={"bf16_master_weights_and_grads": True}, comms_logger={"enabled": True})
    bound = bound_values(read_profile(parallel))
    assert bound == {"bf16": {"bf16_master_weights_and_grads": True}}
    assert bound_values(read_profile(ParallelSection(zero=3))) == {}
    saved = RunInputs(DigestCache(all_ranks(), tmp_path / "digests"), DEFAULT_POLICY, None)
    saved.add_values("parallel.ds_config", parallel.ds_config, bound)
    for values, wrong in ((bound, []), ({**bound, "communication_data_type": "fp16"}, ["communication_data_type"])):
        resumed = RunInputs(DigestCache(all_ranks(), tmp_path / "digests"), DEFAULT_POLICY, saved.entries)
        resumed.add_values("parallel.ds_config", parallel.ds_config, values)
        if not wrong:
            resumed.check(1)
            continue
        with pytest.raises(DataError) as caught:
            resumed.check(1)
        assert [problem.where.rpartition(": ")[2] for problem in caught.value.problems] == wrong

"""DeepSpeed takes each profile, key by key, and trains with it in two real processes."""

import json
from pathlib import Path

import pytest

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

"""The comparison of the starts of experts, at tiny sizes on tokens without text."""

from __future__ import annotations

import json

import pytest

from megatron_ligo.experiments.compare import comparison, comparison_config
from tests.planning.pair_models import ROOT
from tests.training.test_pretrain import make_pair

GROWTH = ROOT / "tools/benchmarks/growth"
ARMS = ["scratch", "copies", "drop", "shared", "learned", "learned.full", "dense"]


def test_the_arms_are_the_starts_and_the_small_model_trained_on():
    spec = comparison_config.load_comparison(GROWTH / "shakespeare_experts.toml")
    assert [arm.name for arm in spec.arms] == ARMS
    assert [arm.small for arm in spec.arms] == [False] * 6 + [True]
    assert [arm.name for arm in spec.arms if arm.fitted] == ["learned"]


@pytest.mark.long
def test_the_starts_of_experts_are_compared(tmp_path):
    for seed, name in enumerate(("train", "valid")):
        make_pair(tmp_path / name, seed)
    small = json.loads((GROWTH / "shakespeare_experts_small.json").read_text())
    small |= {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "vocab_size": 37}
    (tmp_path / "small.json").write_text(json.dumps(small))
    sets = {
        "small.path": f'"{tmp_path / "small.json"}"',
        "large.num_experts": 3,
        "large.ffn_size": 28,
        "large.shared_expert_ffn_size": 28,
        "fit.steps": 1,
        "fit.global_batch_size": 4,
        "fit.micro_batch_size": 4,
        "fit.eval_samples": 4,
        "pretrain.global_batch_size": 4,
        "pretrain.micro_batch_size": 4,
        "pretrain.eval_samples": 4,
        "data.train": f'["{tmp_path / "train"}"]',
        "data.valid": f'["{tmp_path / "valid"}"]',
        "data.seq_length": 12,
        "compare.seeds": [1],
        "compare.scratch_steps": 6,
        "compare.lrs": [1e-3],
        "compare.source_steps": 3,
    }
    settings = [f"{key}={value}" for key, value in sets.items()]
    spec = comparison_config.load_comparison(GROWTH / "shakespeare_experts.toml", settings)
    assert [arm.name for arm in spec.arms] == ARMS
    results = comparison.run_comparison(spec, tmp_path / "out")
    runs = {name: arm["runs"][0] for name, arm in results["arms"].items()}
    assert list(runs) == ARMS
    start = runs["dense"]["begun"]
    assert runs["copies"]["begun"] == pytest.approx(start, rel=1e-4)
    assert runs["shared"]["begun"] == pytest.approx(start, rel=1e-4)
    assert runs["drop"]["begun"] != pytest.approx(start, rel=1e-4)
    unit = results["unit_flops"]
    for name, run in runs.items():
        assert abs(run["flops"] - 0.5 * unit) <= 0.5 * unit / 6, name

import json
from pathlib import Path

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import OperatorSection, RunConfig, value_for_space
from megatron_ligo.config.typed_toml import iterate_settings

TRAINING = (
    "steps optimizer lr betas eps weight_decay clip warmup_steps schedule min_lr global_batch_size micro_batch_size "
    "precision recompute save_every eval_samples seed keep_last timeout_minutes grace_seconds bad_numbers "
    "spike check_replicas_every"
)
PARALLEL = "parallel.tp parallel.pp parallel.zero parallel.sequence_parallel parallel.ds_config"
SURFACE = {
    "small": "path format",
    "large": "num_layers hidden_size ffn_size num_heads num_kv_heads head_dim vocab_size max_positions image_size",
    "operator": "method width_init depth_init noise structure share contract identity gain fresh borrow vocab_noise "
    "position_init rank seed",
    "fit": f"{TRAINING} source depth_lr distill lag eval_every patience keep max_flops {PARALLEL}",
    "handoff": "dtype moments formats timeout_minutes",
    "pretrain": f"{TRAINING} start fresh_head eval_every grown_peak grown_warmup_steps first_sample {PARALLEL}",
    "data": "train valid seq_length seed tokenizer cache mask_rate mask_token ends special_tokens pixel_mean pixel_std",
}


def fails(*sets: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path, sets)
    return str(caught.value)


def test_the_surface_is_frozen():
    """One more key is a decision: it is written here too."""
    found = {key for key, _, _ in iterate_settings(RunConfig)}
    assert found == {f"{section}.{key}" for section, names in SURFACE.items() for key in names.split()}


def test_every_key_has_one_line_of_help():
    for key, field, _ in iterate_settings(RunConfig):
        text = field.metadata["help"]
        assert text and "\n" not in text and len(text) < 90, key


def test_file_and_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[fit]\nlr = 1\nbetas = [0.8, 0.9]\n[fit.parallel]\ntp = 2\n[data]\ntrain = [0.3, "a", 7, "b"]\n')
    config = RunConfig.load(
        path, ["fit.parallel.tp=4", "fit.steps = 20", "small.path=/models/a b", "large.num_layers=32"]
    )
    assert (config.fit.parallel.tp, config.fit.steps, config.small.path) == (4, 20, "/models/a b")
    assert type(config.fit.lr) is float and config.fit.lr == 1.0
    assert config.fit.betas == (0.8, 0.9) and config.data.train == (0.3, "a", 7.0, "b")
    assert (config.large.num_layers, config.large.hidden_size) == (32, None)
    assert (config.pretrain.lr, config.pretrain.weight_decay, config.fit.weight_decay) == (3e-4, 0.1, 0.0)


def test_dict_round_trip():
    config = RunConfig.load(None, ['operator.width_init={default="lossless", ffn="copy"}', "data.train=['a']"])
    table = config.to_dict()
    assert table == json.loads(json.dumps(table)) and RunConfig.from_dict(table) == config
    assert table["large"]["hidden_size"] is None


def test_values_by_space():
    config = RunConfig.load(None, ['operator.width_init={default="lossless"}', "operator.width_init.ffn=copy"])
    assert [value_for_space(config.operator.width_init, space) for space in ("ffn", "residual")] == ["copy", "lossless"]
    assert value_for_space(0.5, "ffn") == 0.5


def test_spaces_are_held_against_the_model():
    section = OperatorSection(width_init={"default": "copy", "residul": "x"}, noise={"default": 0.0, "fnf": 1.0})
    with pytest.raises(ConfigError) as caught:
        section.check_spaces(["residual", "ffn"])
    assert "width_init.residul" in str(caught.value) and "'residual'" in str(caught.value)
    assert "noise.fnf" in str(caught.value) and "2 faults" in str(caught.value)
    OperatorSection(width_init={"default": "copy", "ffn": "x"}).check_spaces(["residual", "ffn"])


def test_all_faults_in_one_error():
    text = fails(
        "fit.stepz=2", "fit.paralel.tp=2", "fiit.steps=1", "pretrain.depth_lr=1", "fit.lr=fast", "fit.clip=-1", "steps"
    )
    assert "7 faults" in text
    for part in (
        "fit.stepz: expected a known key, found 'stepz'. Did you mean 'steps'?",
        "Did you mean 'parallel'?",
        "Did you mean 'fit'?",
        "It is a key of [fit].",
        "fit.lr: expected a number, found 'fast' (text).",
        "fit.clip: expected at least 0.0, found -1.0",
        "--set: expected section.key=value, found 'steps'.",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("fit.steps=1.5", "a whole number"),
        ("fit.steps=true", "a whole number"),
        ("fit.recompute=1", "true or false"),
        ("fit.lr=nan", "a number"),
        ("fit.lr=inf", "a number"),
        ("fit.betas=[0.9]", "a list of 2"),
        ("fit.betas=[0.9, 1.0]", "less than 1.0"),
        ("fit.precision=fp8", "one of fp32, bf16"),
        ("fit.parallel.zero=0", "at least 1 and at most 3"),
        ("fit.parallel=2", "a section"),
        ("fit=2", "section.key=value"),
        ("fit.parallel.sequence_parallel=true", "false with tp = 1"),
        ("fit.micro_batch_size=3", "a multiple of micro_batch_size"),
        ("fit.min_lr=1", "at most lr"),
        ("handoff.formats=['hff']", "Did you mean 'hf'?"),
        ("operator.share={ffn='layer'}", "a table with a default"),
        ("operator.share={default='none'}", "one of all, layer"),
        ("data.train=prefix", "a list"),
        ("data.train=[0.5, 'a', 'b']", "prefixes only, or weight and prefix"),
        ("data.train=[-1, 'a']", "more than 0.0"),
        ("large.hidden_size=0", "at least 1"),
        ("small.path=2024", "found 2024 (a whole number)"),
    ],
)
def test_one_fault(setting, part):
    assert part in fails(setting)


def test_a_pipeline_takes_zero_1_only():
    assert "1 with pp = 2" in fails("pretrain.parallel.pp=2", "pretrain.parallel.zero=2")


def test_a_setting_inside_a_value(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[operator]\nshare = "all"\n')
    assert "'share' is already one value" in fails("operator.share.ffn=layer", path=path)


def test_file_faults(tmp_path):
    assert "nothing there" in fails(path=tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[fit\nsteps = 1\n")
    assert "expected TOML" in fails(path=broken) and "line 1" in fails(path=broken)
    broken.write_bytes(b"\xff\xfe")
    assert "expected TOML" in fails(path=broken)

import json
import math
from pathlib import Path

import pytest

from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config import toml_tables
from megatron_ligo.config.run_config import OperatorSection, RunConfig, value_for_space
from megatron_ligo.config.typed_toml import OTHER_NAMES, describe_type, iterate_settings

TRAINING = (
    "steps optimizer lr betas eps weight_decay clip warmup_steps schedule decay_steps min_lr global_batch_size "
    "micro_batch_size precision recompute save_every async_save eval_samples seed keep_last timeout_minutes "
    "grace_seconds bad_numbers spike check_replicas_every replica_tolerance router_aux_loss trackers tracker_project"
)
PARALLEL = "parallel.tp parallel.pp parallel.ep parallel.cp parallel.zero parallel.sequence_parallel parallel.ds_config"
KEYS = {
    "small": "path format accept",
    "large": "num_layers hidden_size ffn_size num_heads num_kv_heads head_dim vocab_size max_positions image_size "
    "num_experts top_k renormalises_routing shared_expert_ffn_size",
    "operator": "method width_init depth_init noise noise_draw structure share contract identity gain fresh "
    "fresh_scale codes borrow expert_start expert_drop vocab_noise position_init rank seed",
    "fit": f"{TRAINING} source depth_lr distill lag eval_every patience keep max_flops {PARALLEL}",
    "handoff": "dtype moments formats timeout_minutes",
    "pretrain": f"{TRAINING} start codes fresh_head eval_every grown_peak grown_warmup_steps first_sample {PARALLEL}",
    "data": "train valid seq_length seed tokenizer cache mask_rate mask_token ends special_tokens pixel_mean pixel_std",
}


def load_problems(*sets: str, path: Path | None = None) -> dict[str, Problem]:
    """Loads a config that must be refused; returns its problems by location."""
    with pytest.raises(ConfigError) as error:
        RunConfig.load(path, sets)
    return {problem.where: problem for problem in error.value.problems}


def test_the_set_of_keys_is_frozen():
    """A new key is a decision: it is added here too."""
    keys = {key for key, _, _ in iterate_settings(RunConfig)}
    assert keys == {f"{section}.{key}" for section, names in KEYS.items() for key in names.split()}


def test_every_key_has_one_line_of_help():
    for key, field, _ in iterate_settings(RunConfig):
        text = field.metadata["help"]
        assert text and "\n" not in text and len(text) < 90, key


def test_settings_override_the_file(tmp_path):
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
    width_init = config.operator.width_init
    assert [value_for_space(width_init, space) for space in ("ffn", "residual")] == ["copy", "lossless"]
    assert value_for_space(0.5, "ffn") == 0.5


def test_unknown_spaces_are_refused():
    section = OperatorSection(width_init={"default": "copy", "residul": "x"}, noise={"default": 0.0, "fnf": 1.0})
    with pytest.raises(ConfigError) as error:
        section.check_spaces(["residual", "ffn"])
    problems = {problem.where: problem for problem in error.value.problems}
    assert set(problems) == {"operator.width_init.residul", "operator.noise.fnf"}
    assert "'residual'" in problems["operator.width_init.residul"].hint
    OperatorSection(width_init={"default": "copy", "ffn": "x"}).check_spaces(["residual", "ffn"])


def test_all_errors_are_reported_at_once():
    problems = load_problems(
        "fit.stepz=2", "fit.paralel.tp=2", "fiit.steps=1", "pretrain.depth_lr=1", "fit.lr=fast", "fit.clip=-1", "steps"
    )
    assert set(problems) == {
        "fit.stepz", "fit.paralel", "fiit", "pretrain.depth_lr", "fit.lr", "fit.clip", "--set",
    }  # fmt: skip
    assert "'steps'" in problems["fit.stepz"].hint and problems["fit.stepz"].found == "'stepz'"
    assert "'parallel'" in problems["fit.paralel"].hint
    assert "'fit'" in problems["fiit"].hint
    assert "[fit]" in problems["pretrain.depth_lr"].hint
    assert problems["fit.lr"].expected == describe_type(float) and "'fast'" in problems["fit.lr"].found
    assert "0.0" in problems["fit.clip"].expected and "-1.0" in problems["fit.clip"].found
    assert problems["--set"].found == "'steps'"


@pytest.mark.parametrize(
    ("setting", "where", "expected"),
    [
        ("fit.steps=1.5", "fit.steps", describe_type(int)),
        ("fit.steps=true", "fit.steps", describe_type(int)),
        ("fit.recompute=1", "fit.recompute", describe_type(bool)),
        ("fit.lr=nan", "fit.lr", describe_type(float)),
        ("fit.lr=inf", "fit.lr", describe_type(float)),
        ("fit.betas=[0.9]", "fit.betas", describe_type(tuple[float, float])),
        ("fit.betas=[0.9, 1.0]", "fit.betas", "at least 0.0 and less than 1.0"),
        ("fit.precision=fp8", "fit.precision", "one of fp32, bf16"),
        ("fit.parallel.zero=0", "fit.parallel.zero", "at least 1 and at most 3"),
        ("fit.parallel=2", "fit.parallel", "a section"),
        ("fit=2", "--set", "section.key=value"),
        ("fit.parallel.sequence_parallel=true", "fit.parallel.sequence_parallel", "false with tp = 1"),
        ("fit.micro_batch_size=3", "fit.global_batch_size", "a multiple of micro_batch_size"),
        ("fit.min_lr=1", "fit.min_lr", "at most lr = 1e-05"),
        ("handoff.formats=['hff']", "handoff.formats", "one of universal, hf"),
        ("operator.share={ffn='layer'}", "operator.share", "a table with a default"),
        ("operator.share={default='none'}", "operator.share", "one of all, layer"),
        ("data.train=prefix", "data.train", describe_type(tuple[str | float, ...])),
        ("data.train=[0.5, 'a', 'b']", "data.train", "prefixes only, or alternating weights and prefixes"),
        ("data.train=[-1, 'a']", "data.train", "more than 0.0"),
        ("large.hidden_size=0", "large.hidden_size", "at least 1"),
        ("small.path=2024", "small.path", describe_type(str)),
    ],
)
def test_one_error(setting, where, expected):
    problems = load_problems(setting)
    assert list(problems) == [where] and problems[where].expected == expected


def test_a_wrong_choice_gets_a_suggestion():
    assert "'hf'" in load_problems("handoff.formats=['hff']")["handoff.formats"].hint


def test_a_pipeline_requires_zero_1():
    problem = load_problems("pretrain.parallel.pp=2", "pretrain.parallel.zero=2")["pretrain.parallel.zero"]
    assert problem.expected == "1 with pp = 2" and problem.found == "2"


def test_a_key_below_a_plain_value_is_refused(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[operator]\nshare = "all"\n')
    assert list(load_problems("operator.share.ffn=layer", path=path)) == ["--set operator.share.ffn"]


def test_deep_and_long_values_are_refused(tmp_path):
    """With one short message, not a RecursionError."""
    for text in ("fit.lr=" + "[" * 10_000, "fit.lr=" + "[" * 60 + "]" * 60, "fit.lr=" + "{a=" * 900 + "1" + "}" * 900):
        (problem,) = load_problems(text).values()
        assert len(problem) < 1000
    for text in ("fit." + "a." * 5000 + "b=1", "a" * 10**6 + ".b=1", "fit.lr=" + "9" * 5000):
        (problem,) = load_problems(text).values()
        assert len(problem) < 5000
    path = tmp_path / "deep.toml"
    for text in (
        "a = " + "[" * 100_000,
        "a = " + "[" * 60 + "]" * 60,
        "[" + "a." * 200 + "b]\nc = 1\n",
        # Its own parser takes a minute for this key.
        "a." * 50_000 + "b = 1\n",
        '"a" . ' * 50_000 + "b = 1\n",
        f"[fit]\nsteps = {2**63}\n",
        f"[fit]\nsteps = 1{'0' * 4000}\n",
    ):
        path.write_text(text)
        assert list(load_problems(path=path)) == [f"config {path}"]
    assert list(load_problems(f"fit.steps={2**63}")) == ["--set fit.steps"]
    # As after a paste below the sections that are there.
    for text in ("[fit]\nsteps = 1\n[fit]\nlr = 1\n", "[fit]\nlr = 1\nlr = 2\n"):
        path.write_text(text)
        (problem,) = load_problems(path=path).values()
        assert problem.hint.startswith("A section or a key is there twice")
    path.write_text(f"# {'.' * 100}\n[small]\npath = '{'a/b.c/' * 100}'\n")
    assert toml_tables.read_toml(path)["small"]["path"].count(".") == 100


def test_unreadable_files_are_refused(tmp_path):
    missing, broken = tmp_path / "absent.toml", tmp_path / "broken.toml"
    assert list(load_problems(path=missing)) == [f"config {missing}"]
    broken.write_text("[fit\nsteps = 1\n")
    assert "line 1" in load_problems(path=broken)[f"config {broken}"].found
    broken.write_bytes(b"\xff\xfe")
    assert list(load_problems(path=broken)) == [f"config {broken}"]


@pytest.mark.parametrize(
    "value", ['a "b"\n\t\\ \x1b\x7fé😀', True, 3, 1e-300, math.inf, -math.inf, ["😀", 1], []], ids=repr
)
def test_a_written_value_is_read_as_it_was(value):
    assert toml_tables.parse_value(toml_tables.format_value(value)) == value


def test_names_of_other_programs_are_translated():
    """Every translation is a key of some section, and the one that a user meets names it."""
    keys = {key.rpartition(".")[2] for key, _, _ in iterate_settings(RunConfig)}
    assert set(OTHER_NAMES.values()) <= keys and not set(OTHER_NAMES) & keys
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"large": {"num_attention_heads": 4}, "fit": {"parallel": {"context_parallel_size": 2}}})
    hints = {problem.where: problem.hint for problem in caught.value.problems}
    assert hints["large.num_attention_heads"] == "Here it is called 'num_heads'."
    assert hints["fit.parallel.context_parallel_size"] == "Here it is called 'cp'."

"""Sizes that `ligo init` chooses, and the file that it writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megatron_ligo.commands import data as commands_of_data
from megatron_ligo.commands.studies import init
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.growth.validation import build_initial_operator, derive_large_config
from megatron_ligo.planning.parameter_count import count_model
from megatron_ligo.planning.run_plan import plan_run
from megatron_ligo.planning.size_search import choose_sizes
from tests import image_models, layer_norm_models
from tests.tiny_models import hf_llama, llama_config

SMALL = llama_config(num_layers=4, hidden_size=96, num_heads=6, num_kv_heads=3, ffn_size=128, vocab_size=400)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("times", [1.5, 3.0, 8.0])
def test_the_sizes_grow_without_loss_and_divide_by_tp(times, tp):
    parameters = times * count_model(SMALL)
    large = build_initial_operator(SMALL, choose_sizes(SMALL, parameters, tp), OperatorSection()).large
    assert count_model(large) == pytest.approx(parameters, rel=0.25)
    assert large.num_heads / large.num_kv_heads == SMALL.num_heads / SMALL.num_kv_heads
    assert not [size for size in (large.num_kv_heads, large.num_heads, large.ffn_size) if size % tp]


@pytest.mark.parametrize(("times", "tp"), [(0.5, 1), (1000.0, 1), (2.0, 7 * 11 * 13)])
def test_a_number_that_cannot_be_had_is_refused(times, tp):
    with pytest.raises(ConfigError, match="--to"):
        choose_sizes(SMALL, times * count_model(SMALL), tp)


def write_config(*words: str) -> argparse.Namespace:
    args = init.build_parser().parse_args(list(words))
    init.run(args)
    return args


def test_a_folder_of_any_name(tmp_path):
    small, file = tmp_path / 'a "b"\n[large]\n\x1b\x7f😀', tmp_path / "run.toml"
    hf_llama(SMALL).save_pretrained(small)
    write_config(str(small), "--to", "1M", "--output", str(file), "--data", f"{small}/data")
    config = RunConfig.load(file)
    assert config.small.path == f"{small}" and config.data.train == (f"{small}/data/train",)


def test_the_file_is_a_config_with_its_plan(tmp_path, capsys):
    hf_llama(SMALL).save_pretrained(tmp_path / "small")
    file, data = tmp_path / "run.toml", tmp_path / "data"
    words = (str(tmp_path / "small"), "--to", "1M", "--processes", "6", "--tp", "2", "--output", str(file))
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.idx").touch()
    write_config(*words, "--data", str(data))
    printed, config = capsys.readouterr().out, RunConfig.load(file)
    assert "tp 2 x pp 1 x dp 3" in printed and f"wrote {file}; next: ligo fit --processes 6" in printed
    assert config.small.path == str(tmp_path / "small") and config.fit.global_batch_size % 3 == 0
    with pytest.raises(ConfigError, match="one that exists"):
        write_config(*words)


@pytest.mark.parametrize(("text", "value"), [("1.3B", 1.3e9), ("300m", 3e8), ("5000", 5000.0), ("2x", init.Times(2))])
def test_numbers_of_parameters(text, value):
    args = init.build_parser().parse_args([str(Path("small")), "--to", text])
    assert args.to == value


@pytest.mark.parametrize("times", [2.0, 3.5, 8.0])
@pytest.mark.parametrize(("family", "name"), [("gpt2", "GPT2LMHeadModel"), ("bert", "BertForMaskedLM")])
def test_widths_that_a_layer_norm_keeps(family, name, times):
    small = layer_norm_models.config_of(family, name)
    large = derive_large_config(small, choose_sizes(small, times * count_model(small)))
    assert large.hidden_size % small.hidden_size == 0
    assert count_model(large) == pytest.approx(times * count_model(small), rel=0.25)


@pytest.mark.parametrize(
    ("family", "name", "method"),
    [
        ("bert", "BertForMaskedLM", "stack"),
        ("roberta", "RobertaForMaskedLM", "stack"),
        ("gpt2", "GPT2LMHeadModel", "lossless"),
        ("gpt_neox", "GPTNeoXForCausalLM", "lossless"),
    ],
)
def test_the_start_that_the_file_names_can_be_built(family, name, method, tmp_path, capsys):
    """Norms after the residual sums have no lossless start with more layers."""
    _, folder = layer_norm_models.saved(tmp_path / "small", family, name)
    file = tmp_path / "run.toml"
    write_config(str(folder), "--to", "3x", "--output", str(file), "--data", str(tmp_path / "data"))
    assert RunConfig.load(file).operator.method == method
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"wrote {file}; next: ligo prepare TEXTS --tokenizer {folder} --output ")


def test_a_model_of_images_has_images_as_data(tmp_path, capsys):
    _, folder = image_models.saved(tmp_path / "small", image_models.image_config())
    file, data = tmp_path / "run.toml", tmp_path / "data"
    write_config(str(folder), "--to", "2x", "--output", str(file), "--data", str(data))
    assert RunConfig.load(file).data.train == (f"{data}/train.safetensors",)
    assert "seq_length" not in file.read_text()
    assert capsys.readouterr().out.endswith(f"next: ligo prepare-images IMAGES.npz --output {data}\n")


def test_a_plan_that_fails_leaves_no_file(tmp_path, monkeypatch):
    hf_llama(SMALL).save_pretrained(tmp_path / "small")
    file = tmp_path / "run.toml"
    monkeypatch.setattr(init, "TEMPLATE", init.TEMPLATE.replace('method = "{method}"', 'method = "nope {method}"'))
    with pytest.raises(ConfigError, match="a named method"):
        write_config(str(tmp_path / "small"), "--to", "2x", "--output", str(file))
    assert not file.exists()


def test_prepared_data_lead_to_a_config_or_to_a_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands_of_data.print_next_of_data("data", ['data.train=["data/train"]'], "models/small")
    assert capsys.readouterr().out == "wrote data; next: ligo init models/small --to 2x --data data\n"
    (tmp_path / "run.toml").touch()
    commands_of_data.print_next_of_data("data", ['data.train=["data/train"]'], "models/small")
    assert "next: ligo fit --config run.toml '--set=data.train=[\"data/train\"]'" in capsys.readouterr().out


def test_a_plan_without_a_small_model_is_one_error():
    with pytest.raises(ConfigError, match=r"^small\.path: expected a model"):
        plan_run(RunConfig(), 1, 80e9, 3e14)


def test_a_plan_accepts_the_keys_that_the_config_accepts(tmp_path):
    hf_llama(SMALL).save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps(config | {"odd_switch": 7}))
    words = [f"small.path={tmp_path / 'small'}", "large.num_layers=8"]
    with pytest.raises(CheckpointError, match="odd_switch"):
        plan_run(RunConfig.load(None, words), 1, 80e9, 3e14)
    assert plan_run(RunConfig.load(None, [*words, 'small.accept=["odd_switch"]']), 1, 80e9, 3e14)

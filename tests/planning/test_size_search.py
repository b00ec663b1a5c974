"""Sizes that `ligo init` chooses, and the file that it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_ligo.commands.studies import init
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning.parameter_count import count_model
from megatron_ligo.planning.size_search import choose_sizes
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
    file = tmp_path / "run.toml"
    words = (str(tmp_path / "small"), "--to", "1M", "--processes", "6", "--tp", "2", "--output", str(file))
    write_config(*words)
    printed, config = capsys.readouterr().out, RunConfig.load(file)
    assert "tp 2 x pp 1 x dp 3" in printed and f"wrote {file}; next: ligo fit --processes 6" in printed
    assert config.small.path == str(tmp_path / "small") and config.fit.global_batch_size % 3 == 0
    with pytest.raises(ConfigError, match="one that exists"):
        write_config(*words)


@pytest.mark.parametrize(("text", "value"), [("1.3B", 1.3e9), ("300m", 3e8), ("5000", 5000.0)])
def test_numbers_of_parameters(text, value):
    args = init.build_parser().parse_args([str(Path("small")), "--to", text])
    assert args.to == value

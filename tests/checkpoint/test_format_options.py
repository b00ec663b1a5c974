"""Options of single formats are typed: whatever a format does not take is refused before anything is written."""

from __future__ import annotations

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.common.errors import ConfigError
from tests.checkpoint import hf_models

UNUSABLE = [
    ("hf", "shard_bytes", "5GB", "an integer"),
    ("hf", "shard_bytes", 0, "at least 1"),
    ("deepspeed", "tag", 5, "a string"),
    ("pipeline", "tag", "../elsewhere", "the name of a folder"),
    ("universal", "tag", "", "the name of a folder"),
    ("universal", "moments", "non", "one of source, none"),
    ("universal", "param_groups", 1.5, "an integer"),
    ("mcore", "vocab_divisible_by", 0, "at least 1"),
    ("mcore", "vocab_divisible_by", 1.5, "an integer"),
    ("mcore", "max_lr", "high", "a number"),
    ("megatron", "min_lr", -1e-4, "at least 0"),
    ("megatron", "min_lr", True, "a number"),
    ("megatron", "layers", "TE", "one of local, te"),
    ("megatron", "vocab_divisible_by", "128", "an integer"),
    ("fairscale", "embedding", "rows", "one of vocabulary, features"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    _, folder = hf_models.saved(tmp_path_factory.mktemp("options") / "model")
    return formats.open(folder)


@pytest.mark.parametrize(("to", "name", "value", "expected"), UNUSABLE)
def test_an_unusable_value_is_one_error(source, tmp_path, to, name, value, expected):
    with pytest.raises(ConfigError) as error:
        convert(source, tmp_path / "b", to, WriteOptions(extra={name: value}))
    (problem,) = error.value.problems
    assert (problem.where, problem.expected) == (f"option {name}", expected)
    assert repr(value).lower() in problem.found.lower()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", formats.writers())
def test_every_unknown_name_is_reported(source, tmp_path, to):
    with pytest.raises(ConfigError) as error:
        convert(source, tmp_path / "b", to, WriteOptions(extra={"shard_byte": 3, "tags": "x"}))
    assert [problem.where for problem in error.value.problems] == ["option shard_byte", "option tags"]
    assert not list(tmp_path.iterdir())


def test_all_errors_come_at_once(source, tmp_path):
    options = WriteOptions(tp=2, workers=0, extra={"moments": "non", "tag": 5})
    with pytest.raises(ConfigError) as error:
        convert(source, tmp_path / "b", "universal", options)
    assert {problem.where for problem in error.value.problems} == {"option moments", "option tag", "layout", "workers"}


def test_a_format_without_options_takes_none(source):
    with pytest.raises(ConfigError) as error:
        formats.get("gguf").parse_options({"tag": "x"})
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == ("option tag", "'x'")


def test_defaults_are_the_options_left_out():
    assert formats.get("universal").parse_options({}) == formats.get("universal").options()
    assert formats.get("universal").parse_options({"tag": "start"}).folder(7) == "start"
    assert formats.get("universal").parse_options({}).folder(7) == "global_step7"
    rates = formats.get("megatron").parse_options({"max_lr": 1, "min_lr": 0.5}).rates()
    # A whole number stays one: it is stored as it was given.
    assert rates == {"max_lr": 1, "min_lr": 0.5} and type(rates["max_lr"]) is int

"""Allow-lists of keys: what passes, what is refused, what the user accepts by name."""

from __future__ import annotations

import pytest

from megatron_ligo.checkpoint.source_keys import (
    NO_KEYS,
    AcceptedKeys,
    KeyTable,
    check_agreement,
    is_empty,
    is_same_value,
)
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector

TABLE = KeyTable(
    fields={"num_layers": "num_layers"},
    harmless={"seed": "drawn before training"},
    fixed={"bias": (False,), "scale": (1.0, None)},
)


def _problems(stated: dict, accepted: AcceptedKeys = NO_KEYS) -> list[str]:
    errors = ErrorCollector("the source", CheckpointError)
    TABLE.check(stated, accepted, errors)
    return [problem.where for problem in errors.problems]


def test_known_keys_and_empty_values_pass():
    assert not _problems({"num_layers": 3, "seed": 7, "bias": False, "scale": 1})
    for value in (None, False, 0, 0.0, "", [], {}, ()):
        assert not _problems({"new_flag": value})


@pytest.mark.parametrize("value", [True, 1, -1, 0.5, "x", [0], {"a": 0}, object()])
def test_an_unknown_key_with_a_value_is_refused(value):
    assert _problems({"new_flag": value}) == ["new_flag"]
    accepted = AcceptedKeys(["new_flag"])
    assert not _problems({"new_flag": value}, accepted)
    assert accepted.used == {"new_flag": value}


@pytest.mark.parametrize("stated", [{"bias": True}, {"bias": 0}, {"bias": None}, {"scale": 2.0}, {"scale": True}])
def test_a_fixed_key_has_one_of_its_values_and_is_never_accepted(stated):
    assert _problems(stated, AcceptedKeys(stated)) == list(stated)


def test_a_name_that_no_source_states_is_refused():
    accepted = AcceptedKeys(["new_flag", "mistyped"])
    _problems({"new_flag": 1}, accepted)
    with pytest.raises(ConfigError) as refusal:
        accepted.check_used("DIR")
    assert [problem.where for problem in refusal.value.problems] == ["--accept mistyped"]


def test_same_values():
    assert is_same_value(1, 1.0)
    assert is_same_value((1, 0), [1, 0])
    assert not is_same_value(True, 1)
    assert not is_same_value("1", 1)
    assert not is_empty(True)
    assert not is_empty((0,))


def test_sources_that_disagree_are_refused_field_by_field():
    errors = ErrorCollector("two sources", CheckpointError)
    check_agreement({"a": 1, "b": 2, "c": 3}, {"a": 1.0, "b": 4, "d": 5}, "args", "config.json", errors)
    assert [problem.where for problem in errors.problems] == ["args: b"]

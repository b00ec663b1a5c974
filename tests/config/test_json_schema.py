"""The schema of run.toml against what the reader of run.toml accepts and refuses."""

from __future__ import annotations

import json

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config import typed_toml
from megatron_ligo.config.json_schema import build_schema
from megatron_ligo.config.run_config import RunConfig

jsonschema = pytest.importorskip("jsonschema", reason="requirements-dev.txt has it")

TABLES = [
    ({"fit": {"steps": 3, "lr": 1, "parallel": {"tp": 2}}, "small": {"path": "models/small"}}, True),
    ({"operator": {"noise": {"default": 0.5}, "share": "layer"}, "data": {"train": [0.3, "a", 0.7, "b"]}}, True),
    ({"operator": {"share": {"default": "all", "ffn": "layer"}}}, True),
    ({"fit": {"betas": [0.9, 0.95]}}, True),
    ({"fit": {"stepz": 3}}, False),
    ({"fitt": {}}, False),
    ({"fit": {"steps": "3"}}, False),
    ({"fit": {"steps": -1}}, False),
    ({"fit": {"betas": [0.9]}}, False),
    ({"fit": {"precision": "fp8"}}, False),
    ({"large": {"num_heads": 0}}, False),
    ({"operator": {"share": "none"}}, False),
]


@pytest.mark.parametrize(("table", "valid"), TABLES)
def test_the_schema_accepts_what_the_reader_does(table, valid):
    schema = json.loads(json.dumps(build_schema()))
    jsonschema.Draft7Validator.check_schema(schema)
    assert jsonschema.Draft7Validator(schema).is_valid(table) == valid
    if valid:
        RunConfig.from_dict(table, "run.toml")
    else:
        with pytest.raises(ConfigError):
            RunConfig.from_dict(table, "run.toml")


def test_every_key_is_in_the_schema():
    schema = build_schema()
    for key, field, _ in typed_toml.iterate_settings(RunConfig):
        part = schema
        for name in key.split("."):
            part = part["properties"][name]
        assert part["description"] == field.metadata["help"]

"""YAML files of plain values: no object is built, and no key is there twice."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_ligo.common.errors import CheckpointError, Problem

# Real ones have 30 kB.
MAX_BYTES = 4_000_000


class _Loader(yaml.SafeLoader):
    """Builds plain values only, and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path) -> object:
    """Returns the content of a file. Raises CheckpointError for one that is damaged, too large or more than values."""
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(Problem(f"{path}", f"at most {MAX_BYTES} bytes", path.stat().st_size))
    try:
        # A subclass of SafeLoader: no objects are built.
        return yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(Problem(f"{path}", "YAML of plain values", reason)) from None

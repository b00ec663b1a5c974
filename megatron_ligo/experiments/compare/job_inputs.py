"""What the jobs of a comparison stand on, by content: the small model, the data and the tokenizer."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint import formats
from megatron_ligo.common.errors import DataError, ErrorCollector, LigoError
from megatron_ligo.common.file_digest import hash_json
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.tokenizer import choose_tokenizers
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export.run_inputs import DEFAULT_POLICY, SMALL_MODEL, RunInputs, compare_entries, describe_acceptance


class JobInputs:
    """Digests of the inputs of jobs, computed once for each set of paths."""

    def __init__(self) -> None:
        self._known: dict[str, dict] = {}

    def describe(self, config: RunConfig) -> dict:
        """Returns name -> {path, kind, digest} of the files and the small model that are there."""
        data, small = config.data, config.small
        key = hash_json([small.path, small.format, data.tokenizer, list(data.train), list(data.valid)])
        if key not in self._known:
            inputs = RunInputs(DigestCache(), DEFAULT_POLICY, None)
            _add_small_model(inputs, config)
            files = {}
            for split, entries in (("train", data.train), ("valid", data.valid)):
                for number, prefix in enumerate((entry for entry in entries if isinstance(entry, str)), 1):
                    for suffix in ("", ".bin", ".idx"):
                        files[f"data.{split} {number}{suffix}"] = Path(f"{prefix}{suffix}")
            if data.tokenizer:
                (files["tokenizer"],) = choose_tokenizers(data.tokenizer, ())
            inputs.add_files(files)
            self._known[key] = inputs.entries
        return self._known[key]

    def check(self, saved: dict | None, config: RunConfig, folder: Path, accept_changed: bool) -> dict | None:
        """Raises DataError with every input that has changed since the job in `folder` ran.

        accept_changed: returns what to record about the changes instead; None if there are none.
        """
        errors = ErrorCollector(f"{folder}: what the run stands on has changed", DataError)
        if saved is not None:
            errors.problems += compare_entries(saved, self.describe(config))
        if not accept_changed:
            errors.raise_if_any()
        return describe_acceptance(errors.problems) if errors.problems else None


def _add_small_model(inputs: RunInputs, config: RunConfig) -> None:
    path = config.small.path
    if not path or not Path(path).exists() or Path(path).suffix == ".json":
        return
    try:
        source = formats.open_small(config.small)
    except LigoError:
        # The job's own error says more.
        return
    inputs.add_model(SMALL_MODEL, path, source)

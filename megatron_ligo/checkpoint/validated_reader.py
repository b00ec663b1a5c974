"""A Reader that validates every tensor it passes on: shape, dtype, NaN and Inf. Records a digest of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem


class ValidatedReader(Reader):
    """Passes on a source's tensors, weights cast to `dtype` (None: as stored), moments only if `with_moments`.

    Results go into the journal, so that a resumed run need not read a tensor again. `finish` raises CheckpointError
    with every error of every tensor; `read` raises it as soon as one tensor cannot be read.
    """

    def __init__(
        self,
        source: Reader,
        dtype: torch.dtype | None,
        with_moments: bool,
        journal: Journal,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.source = source
        self.format, self.path = source.format, source.path
        self.model_config, self.step = source.model_config, source.step
        self.layout, self.files, self.carried = source.layout, source.files, source.carried
        self.groups, self.accepted = source.groups, source.accepted
        self._dtype = dtype
        self._kinds = (WEIGHT, *MOMENTS) if with_moments and source.has_moments else (WEIGHT,)
        self._journal = journal
        self._progress = progress
        self._sizes = {key: self._size(key) for key in source.keys()}  # noqa: SIM118 - no dict
        self.total_bytes = sum(self._sizes.values()) * len(self._kinds)
        self._done_bytes = sum(
            self._sizes[key] for key in self._sizes for kind in self._kinds if self._journal_entry(key, kind)
        )

    @property
    def has_moments(self) -> bool:
        return len(self._kinds) > 1

    def info(self, key: str) -> TensorInfo:
        info = self.source.info(key)
        return TensorInfo(info.shape, self._dtype or info.dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        try:
            return self._read_checked(key, kind)
        except CheckpointError:
            # The conversion has failed: the remaining tensors are read only to report every error at once.
            self._raise_all_errors()
            raise

    def _read_checked(self, key: str, kind: str) -> Tensor:
        tensor = self.source.read(key, kind)
        expected = self.source.info(key)
        dtype = expected.dtype if kind == WEIGHT else torch.float32
        if (tuple(tensor.shape), tensor.dtype) != (expected.shape, dtype):
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise CheckpointError(Problem(f"{key} ({kind})", f"{dtype} {expected.shape}", found))
        if kind == WEIGHT and self._dtype:
            tensor = tensor.to(self._dtype)
        if not self._journal_entry(key, kind):
            self._record(key, kind, tensor.contiguous())
        return tensor

    def finish(self) -> None:
        """Checks that every tensor was read. Raises CheckpointError with all that are invalid."""
        for key in self._sizes:
            for kind in self._kinds:
                assert self._journal_entry(key, kind), f"{key} ({kind}) was never read"
        self._raise_all_errors()

    def _raise_all_errors(self) -> None:
        """Raises CheckpointError with the errors of all tensors, reading those that were not read yet."""
        errors = ErrorCollector(f"{self.path or self.format} has tensors that cannot be used", CheckpointError)
        for key in self._sizes:
            for kind in self._kinds:
                try:
                    if not self._journal_entry(key, kind):
                        self._read_checked(key, kind)
                except CheckpointError as error:
                    errors.problems.extend(error.problems)
                    continue
                non_finite = self._journal_entry(key, kind)["bad"]
                if non_finite:
                    errors.add(f"{key} ({kind})", "finite numbers", non_finite)
        errors.raise_if_any()

    def digests(self) -> dict[str, dict[str, dict]]:
        """Returns shape, dtype and digest by key and kind, as the manifest lists them."""
        return {key: {kind: self._manifest_entry(key, kind) for kind in self._kinds} for key in self._sizes}

    def _manifest_entry(self, key: str, kind: str) -> dict:
        return {name: value for name, value in self._journal_entry(key, kind).items() if name != "bad"}

    def _journal_entry(self, key: str, kind: str) -> dict | None:
        return self._journal.get("read", key, kind)

    def _size(self, key: str) -> int:
        info = self.source.info(key)
        return torch.Size(info.shape).numel() * (self._dtype or info.dtype).itemsize

    def _record(self, key: str, kind: str, tensor: Tensor) -> None:
        entry = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "digest": digest.hash_bytes(digest.as_bytes(tensor)),
            "bad": describe_non_finite(tensor),
        }
        self._journal.add("read", key, kind, value=entry)
        self._done_bytes += self._sizes[key]
        if self._progress:
            self._progress(self._done_bytes, self.total_bytes)


def describe_non_finite(tensor: Tensor) -> str:
    """Counts the NaN and Inf of a tensor of any shape, as text; "" if all its numbers are finite."""
    if tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        return ""
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    return " and ".join(f"{count} {name}" for count, name in ((nan, "NaN"), (inf, "Inf")) if count)

"""The one check of every tensor that comes out of a file: plain, dense, on the CPU, with bytes of its own.

What a tensor's bytes are worth is checked where the file is read: that they lie within it, and are all there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io.file_layout import SAFETENSORS_DTYPES
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

PLAIN_DTYPES = tuple(SAFETENSORS_DTYPES)
EXPECTED = "a dense tensor of plain numbers"


@dataclass(frozen=True)
class UnusableTensor:
    """Stands in for a tensor of a file that is no plain dense one. reason: what it is instead."""

    reason: str


def explain_unusable(tensor: object) -> str:
    """Returns why a value, a tensor of any shape, is no plain dense tensor on the CPU; "" if it is one."""
    if isinstance(tensor, UnusableTensor):
        return tensor.reason
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return "a tensor that is sparse, nested or quantized"
    if tensor.device.type != "cpu":
        return f"a tensor on the device {tensor.device}"
    if tensor.dtype not in PLAIN_DTYPES:
        return f"{tensor.dtype}"
    if tensor.is_neg() or tensor.is_conj():
        return "a view of conjugated or negated numbers"
    if elements_overlap(tensor.shape, tensor.stride()):
        return f"a tensor of shape {tuple(tensor.shape)} whose elements share stored numbers"
    return ""


def check_tensor(where: str, tensor: Tensor) -> Tensor:
    """Returns a tensor of any shape. Raises CheckpointError unless it is plain, dense and on the CPU."""
    reason = explain_unusable(tensor)
    if reason:
        raise CheckpointError(Problem(where, EXPECTED, reason))
    return tensor


def check_tree(where: str, tree: object) -> None:
    """Raises CheckpointError with every unusable tensor in nested containers, named by the keys that lead to it."""
    errors = ErrorCollector(f"{where} holds tensors that cannot be used", CheckpointError)
    for name, tensor in _iterate_tensors(tree):
        reason = explain_unusable(tensor)
        if reason:
            errors.add(f"{name or 'its tensor'} ({where})", EXPECTED, reason)
    if len(errors.problems) == 1:
        raise CheckpointError(errors.problems[0])
    errors.raise_if_any()


def _iterate_tensors(tree: object) -> Iterator[tuple[str, object]]:
    """Yields each tensor of nested containers once, with the keys that lead to it."""
    visited: set[int] = set()
    stack = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, Tensor | UnusableTensor):
            yield name, node
        elif id(node) not in visited:
            visited.add(id(node))
            prefix = f"{name}." if name else ""
            if isinstance(node, Mapping):
                stack += [(f"{prefix}{key}"[:200], value) for key, value in reversed(node.items())]
            elif isinstance(node, list | tuple | set | frozenset):
                stack += [(f"{prefix}{number}", value) for number, value in reversed([*enumerate(node)])]
            elif type(node).__module__.startswith(__name__.partition(".")[0]) and not isinstance(node, type):
                stack += [(f"{prefix}{key}", value) for key, value in vars(node).items()]


def elements_overlap(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Returns whether several elements of a strided tensor of this shape may lie on one stored number."""
    extent = 0
    for step, length in sorted((step, length) for length, step in zip(size, stride, strict=True) if length > 1):
        if step <= extent:
            return 0 not in size
        extent += (length - 1) * step
    return False


def check_own_bytes(tensors: Mapping[str, Tensor], tied: Iterable[Collection[str]], errors: ErrorCollector) -> None:
    """Adds an error for two tensors (of any shapes) that share stored numbers, unless they are the same and tied.

    tied: sets of names that the architecture allows to be one tensor.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    allowed = [set(names) for names in tied]
    for name, tensor in tensors.items():
        if tensor.numel():
            by_storage[tensor.untyped_storage().data_ptr()].append((name, tensor))
    for sharing in by_storage.values():
        kept: list[tuple[str, Tensor]] = []
        for name, tensor in sharing:
            same = next((other for other, kept_tensor in kept if _are_same(tensor, kept_tensor)), None)
            if same is None or not any({name, same} <= names for names in allowed):
                kept.append((name, tensor))
        for name, other in _overlapping(kept):
            errors.add(name, f"numbers of its own, or a tensor tied to {other}", f"those of {other}")


def _are_same(one: Tensor, other: Tensor) -> bool:
    def place(tensor: Tensor) -> tuple:
        return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype

    return place(one) == place(other)


def _overlapping(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, str]]:
    """Yields the names of tensors of one storage that share numbers with an earlier one, and that one's name."""
    if all(tensor.is_contiguous() for _, tensor in tensors):
        end, previous = 0, ""
        for name, tensor in sorted(tensors, key=lambda entry: entry[1].data_ptr()):
            if tensor.data_ptr() < end:
                yield name, previous
            if tensor.data_ptr() + tensor.nbytes > end:
                end, previous = tensor.data_ptr() + tensor.nbytes, name
        return
    # Columns of one matrix interleave: only a map of the storage tells whether they are apart.
    storage_bytes = tensors[0][1].untyped_storage().nbytes()
    owners: dict[torch.dtype, Tensor] = {}
    for number, (name, tensor) in enumerate(tensors, 1):
        numel = storage_bytes // tensor.dtype.itemsize
        owner = owners.setdefault(tensor.dtype, torch.zeros(numel, dtype=torch.int16))
        view = owner.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        first = int(view.max())
        if first:
            yield name, tensors[first - 1][0]
        view.fill_(number)

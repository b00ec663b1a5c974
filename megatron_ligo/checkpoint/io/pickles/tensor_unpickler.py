"""Unpickles what torch.save pickles: dense tensors, plain values and the classes that the caller allows.

Nothing else is imported or called, so that no file executes code. Tensors are built here, on storages that the caller
finds, and only if their elements lie within them.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io.pickles import pickle_enums
from megatron_ligo.checkpoint.io.tensor_check import UnusableTensor, elements_overlap

# A byte string of protocol 2 is pickled as text in this encoding.
TEXT_ENCODINGS = ("latin1", "latin-1")
# The most zeros that a pickled bytearray may ask for by a number.
MOST_ZEROS = 1 << 20
# What weights are never stored as: their rebuilding functions, and what such a tensor is called.
UNUSABLE = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data (on the meta device)",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_wrapper_subclass": "a tensor of another class",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
# Bytes of an element of a quantized storage. Its tensors are refused.
QUANTIZED_WIDTHS = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1}
QUANTIZATIONS = (
    "per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric",
    "per_channel_affine_float_qparams",
)  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype}

# (key, dtype, number of elements) -> the storage's elements, (numel,); its bytes for UntypedStorage.
FindStorage = Callable[[str, torch.dtype, int], Tensor]


@dataclass(frozen=True)
class StorageKind:
    """The class of a pickled storage. dtype: of its elements; those of a quantized one are `width` bytes each."""

    dtype: torch.dtype
    width: int = 1


class TensorKind:
    """Stands for torch's own classes of tensors, which a file may name and not call."""


@dataclass(frozen=True)
class PickledStorage:
    """A storage that a pickle refers to: its elements, (numel,)."""

    elements: Tensor


class TensorUnpickler(pickle._Unpickler):
    """Unpickles one object from a file, with its tensors on the storages that `find_storage` returns.

    stand_ins: (object, "module.name") for further classes that the file may name; the objects take their place.
    Raises UnpicklingError for anything else, and other errors for damaged bytes.
    """

    # A copy: the overrides below change it.
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, find_storage: FindStorage, stand_ins: Sequence[tuple[object, str]] = ()):
        super().__init__(file, encoding="utf-8")
        self._find_storage = find_storage
        self._stand_ins = {name: stand_in for stand_in, name in stand_ins}
        if stand_ins:
            member = pickle_enums.enum_stand_ins(stand_in for stand_in, _ in stand_ins)
            self._stand_ins[".".join(pickle_enums.GETATTR)] = member
        self._kinds = tuple(stand_in for stand_in, _ in stand_ins if isinstance(stand_in, type))

    def find_class(self, module: str, name: str) -> object:
        module = {"__builtin__": "builtins", "torch.tensor": "torch._tensor"}.get(module, module)
        full_name = f"{module}.{name}"
        if full_name in self._stand_ins:
            return self._stand_ins[full_name]
        if full_name in ALLOWED:
            return ALLOWED[full_name]
        if module == "torch._utils" and name in UNUSABLE:
            reason = UNUSABLE[name]
            return lambda *_: UnusableTensor(reason)
        raise pickle.UnpicklingError(f"the file names {full_name[:200]!r}")

    def persistent_load(self, reference: object) -> PickledStorage:
        is_storage = (
            isinstance(reference, tuple) and len(reference) in (5, 6) and reference[0] in ("storage", b"storage")
        )
        if not is_storage:
            raise pickle.UnpicklingError("a reference to something other than a storage")
        _, kind, key, _, numel, *view = reference
        if not isinstance(kind, StorageKind) or type(key) is not str or not _is_count(numel):
            raise pickle.UnpicklingError("a storage without kind, key and size")
        elements = self._find_storage(key, kind.dtype, numel * kind.width)
        if view and view[0] is not None:
            _, start, length = view[0]
            if not _is_count(start) or not _is_count(length) or start + length > numel:
                raise pickle.UnpicklingError("a part beyond its storage")
            elements = elements[start : start + length]
        return PickledStorage(elements)

    # The base class fills, and sets attributes of, whatever lies on its stack.

    def load_build(self) -> None:
        target = self.stack[-2]
        # The members of an enum are shared by the whole process.
        if isinstance(target, self._kinds) and not isinstance(target, Enum):
            super().load_build()
        elif isinstance(target, OrderedDict | Counter):
            # Attributes of a state dict: versions of its modules.
            self.stack.pop()
        else:
            raise pickle.UnpicklingError(f"attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        self._expect(self.stack[-3], dict)
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        self._expect(self.metastack[-1][-1], dict)
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_append(self) -> None:
        self._expect(self.stack[-2], list)
        super().load_append()

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        self._expect(self.metastack[-1][-1], list)
        super().load_appends()

    dispatch[pickle.APPENDS[0]] = load_appends

    def load_bytearray8(self) -> None:
        # pickle's own allocates what the file states before it reads.
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def _expect(self, target: object, kind: type) -> None:
        if not isinstance(target, kind):
            raise pickle.UnpicklingError(f"items of a {type(target).__name__}")


def _is_count(number: object) -> bool:
    return type(number) is int and number >= 0


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> object:
    """Builds a tensor on a storage, as torch.save pickled it; the rest: requires_grad, hooks, and whether it is a view
    of the conjugate or negative. Gradients are not tracked."""
    if not isinstance(storage, PickledStorage):
        raise ValueError("a tensor without a storage")
    return _view(storage.elements, offset, size, stride, rest[2] if len(rest) > 2 else None)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    _gradient: object,
    _hooks: object,
    dtype: object,
    *rest,
) -> object:
    """Builds a tensor whose dtype has no class of storages."""
    if not isinstance(storage, PickledStorage) or type(dtype) is not torch.dtype:
        raise ValueError("a tensor without a storage")
    return _view(storage.elements.view(dtype), offset, size, stride, rest[0] if rest else None)


def _view(elements: Tensor, offset: object, size: object, stride: object, metadata: object) -> object:
    are_sizes = all(isinstance(part, tuple) and all(map(_is_count, part)) for part in (size, stride))
    if not are_sizes or not _is_count(offset) or len(size) != len(stride):
        raise ValueError("a tensor without sizes and strides")
    if metadata:
        return UnusableTensor("a view of conjugated or negated numbers")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    is_empty = 0 in size
    if (offset if is_empty else last + 1) > elements.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} beyond its storage of {elements.numel()} elements")
    if elements_overlap(size, stride):
        return UnusableTensor(f"a tensor of shape {tuple(size)} whose elements share {elements.numel()} stored numbers")
    return elements.as_strided(size, stride, offset)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(rebuild: object, kind: object, arguments: object, _state: object) -> object:
    """Builds a tensor that has attributes, which are dropped."""
    if not isinstance(kind, TensorKind) or rebuild not in (_rebuild_tensor, _rebuild_tensor_v3):
        return UnusableTensor("a tensor of another class")
    return rebuild(*arguments)


def _encode(text: object, encoding: object = "utf-8") -> bytes:
    if type(text) is not str or encoding not in TEXT_ENCODINGS:
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _bytearray(content: object = b"", encoding: object = None) -> bytearray:
    if type(content) is int and content <= MOST_ZEROS:
        return bytearray(content)
    return bytearray(content if isinstance(content, bytes) else _encode(content, encoding))


def _storage_kinds() -> dict[str, StorageKind]:
    kinds = {f"torch.{name}Storage": StorageKind(dtype) for name, dtype in STORAGE_DTYPES.items()}
    return kinds | {f"torch.{name}Storage": StorageKind(torch.uint8, width) for name, width in QUANTIZED_WIDTHS.items()}


ALLOWED: dict[str, object] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "builtins.complex": complex,
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.Tensor": TensorKind(),
    "torch.nn.parameter.Parameter": TensorKind(),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.storage.UntypedStorage": StorageKind(torch.uint8),
    **_storage_kinds(),
    # Arguments of tensors that are then refused by name.
    "torch.serialization._get_layout": str,
    **{f"torch.{name}": name for name in QUANTIZATIONS},
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}

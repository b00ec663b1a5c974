"""What the coverage-guided fuzzing draws: one part of one file of a sample, put back into an otherwise valid sample."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.common.errors import user_message
from megatron_ligo.common.file_digest import SEAL, hash_bytes, seal
from megatron_ligo.testing.fuzz.json_mutators import HOSTILE_VALUES, list_files, list_slots
from megatron_ligo.testing.fuzz.mutators import HOSTILE_LENGTHS
from megatron_ligo.testing.fuzz.sample_files import Sample

# CPU seconds that reading one sample may take.
SECONDS_LIMIT = 5.0
# Memory that reading a file may take: this many times its size, and a base.
FILE_MULTIPLE, BASE_BYTES = 20, 64 << 20
PICKLE_NAME = "data.pkl"


@dataclass(frozen=True)
class FilePartCodec:
    """How a part of a file is taken out and put back, so that the file around it stays valid.

    extract: the part's bytes, None if the file has no such part. rebuild: the file with other bytes there.
    """

    name: str
    extract: Callable[[Path, bytes], bytes | None]
    rebuild: Callable[[bytes, bytes], bytes]


def _extract_header(path: Path, content: bytes) -> bytes | None:
    return content[8 : 8 + struct.unpack("<Q", content[:8])[0]] if path.suffix == ".safetensors" else None


def _rebuild_header(content: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + content[8 + struct.unpack("<Q", content[:8])[0] :]


def _extract_pickle(path: Path, content: bytes) -> bytes | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return next((archive.read(name) for name in archive.namelist() if name.endswith(PICKLE_NAME)), None)


def _rebuild_pickle(content: bytes, program: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for info in old.infolist():
            new.writestr(info, program if info.filename.endswith(PICKLE_NAME) else old.read(info))
    return written.getvalue()


def _extract_sealed(path: Path, content: bytes) -> bytes | None:
    return content if path.suffix == ".json" and SEAL.encode() in content else None


def _rebuild_sealed(content: bytes, drawn: bytes) -> bytes:
    """Gives a record the digest of its new content: behind a wrong one nothing would be read."""
    try:
        return json.dumps(seal(json.loads(drawn))).encode()
    except (ValueError, AttributeError, RecursionError):
        return drawn


CODECS = (
    FilePartCodec("whole", lambda path, content: content, lambda content, drawn: drawn),
    FilePartCodec("header", _extract_header, _rebuild_header),
    FilePartCodec("pickle", _extract_pickle, _rebuild_pickle),
    FilePartCodec("sealed", _extract_sealed, _rebuild_sealed),
)


@dataclass(frozen=True)
class FuzzTarget:
    """path: of the file in the sample's folder."""

    sample: Sample
    path: str
    codec: FilePartCodec

    @property
    def name(self) -> str:
        return re.sub(r"[^A-Za-z0-9.]+", "_", f"{self.sample.name}_{self.path}_{self.codec.name}")


def list_targets(good: Path, samples: Iterable[Sample]) -> list[FuzzTarget]:
    """Returns every part of every file of the samples in `good`; of files that differ in numbers alone, the first."""
    targets = {}
    for sample in samples:
        for path in list_files(good / sample.name):
            content = path.read_bytes()
            for codec in CODECS:
                kind = sample.name, path.parent.name, re.sub(r"\d+", "", path.name), codec.name
                if kind not in targets and codec.extract(path, content) is not None:
                    targets[kind] = FuzzTarget(sample, f"{path.relative_to(good / sample.name)}", codec)
    return _drop_repeated(targets)


def _drop_repeated(targets: dict[tuple[str, ...], FuzzTarget]) -> list[FuzzTarget]:
    """Drops the folders of a format that has one for each parameter, all with files of the same names."""
    counted: dict[tuple[str, ...], int] = {}
    kept = []
    for (sample, _, name, codec), target in targets.items():
        key = sample, name, codec
        counted[key] = counted.get(key, 0) + 1
        if counted[key] <= 3:
            kept.append(target)
    return kept


@dataclass(frozen=True)
class FuzzFinding:
    """kind: what was wrong. detail: the traceback, or the figures. key: equal for findings of one cause."""

    kind: str
    detail: str
    key: str


class TargetTrial:
    """Reads a sample whose target holds other bytes. folder: of its own; the sample is copied there."""

    def __init__(self, target: FuzzTarget, good: Path, folder: Path):
        self.target, self.good, self.folder = target, good / target.sample.name, folder / "content"
        self.file = self.folder / target.path
        self.original = (self.good / target.path).read_bytes()
        self.first = target.codec.extract(self.good / target.path, self.original)
        self._restore()
        # What is imported and kept at the first reading is not counted later.
        self.read(self.first)

    def read(self, drawn: bytes) -> FuzzFinding | None:
        """Reads the sample with `drawn` in place; returns what was wrong with that."""
        content = self.target.codec.rebuild(self.original, drawn)
        self.file.write_bytes(content)
        before = self._listing()
        _reset_peak()
        used, begin = _memory("VmRSS"), time.process_time()
        finding = self._read_safely()
        seconds, peak = time.process_time() - begin, _memory("VmHWM") - used
        limit = FILE_MULTIPLE * len(content) + BASE_BYTES
        # Memory first: a busy machine takes seconds to fill it.
        if finding is None and peak > limit:
            finding = FuzzFinding("took too much memory", f"{peak} bytes for {len(content)} bytes", "memory")
        if finding is None and seconds > SECONDS_LIMIT:
            finding = FuzzFinding("took too long", f"{seconds:.1f} s for {len(content)} bytes", "seconds")
        if self._listing() != before:
            self._restore()
        return finding

    def _read_safely(self) -> FuzzFinding | None:
        try:
            repr(self.target.sample.read(self.folder))
        except MemoryError:
            return FuzzFinding("took too much memory", traceback.format_exc(), "memory")
        except BaseException as error:
            if user_message(error) is None:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} {frame.filename}:{frame.lineno}"
                return FuzzFinding("an internal error", traceback.format_exc(), hash_bytes(place.encode())[:12])
        return None

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder)

    def _listing(self) -> list[tuple[str, int, int]]:
        files = [(path, path.lstat()) for path in sorted(self.folder.rglob("*"))]
        return [(f"{path}", status.st_size, status.st_mtime_ns) for path, status in files]


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """Returns the bytes that the kernel counts for this process: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def mutate_bytes(draw: random.Random, data: bytes, max_size: int) -> bytes:
    """Returns `data` with some bytes changed, cut or repeated, or with a hostile value in it or in one of its lines."""
    if draw.random() < 0.5:
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        edited = _edit_value(draw, data) or b"\n".join(
            [*lines[:at], _edit_value(draw, lines[at]) or b"", *lines[at + 1 :]]
        )
        if len(edited) <= max_size:
            return edited
    content = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 2, 8))):
        _edit_bytes(draw, content)
        content = content or bytearray(1)
    return bytes(content[:max_size])


def _edit_bytes(draw: random.Random, content: bytearray) -> None:
    at, length, how = draw.randrange(len(content)), draw.choice((1, 4, 64)), draw.randrange(5)
    if how == 0:
        content[at] = draw.randrange(256)
    elif how == 1:
        content[at] ^= 1 << draw.randrange(8)
    elif how == 2:
        del content[at : at + length]
    elif how == 3:
        content[at:at] = content[at : at + length]
    else:
        content[at : at + 8] = struct.pack("<Q", draw.choice(HOSTILE_LENGTHS))


def _edit_value(draw: random.Random, data: bytes) -> bytes | None:
    """Returns a JSON text with one value gone, hostile, or another of its values; None for other bytes."""
    try:
        table = json.loads(data)
        slots = list(list_slots(table))
        if not slots:
            return None
        (holder, key), (other, name) = draw.choice(slots), draw.choice(slots)
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice((*HOSTILE_VALUES, other[name]))
        return json.dumps(table).encode()
    except (ValueError, RecursionError):
        # No JSON, or a value that holds itself.
        return None

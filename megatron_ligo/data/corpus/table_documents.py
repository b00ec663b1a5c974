"""Reads one text column of Parquet and Arrow files, as Hugging Face's datasets store them, in batches of rows."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.byte_streams import import_pyarrow
from megatron_ligo.data.corpus.raw_chunks import CHUNK_BYTES, RawChunk

MAX_BATCH_ROWS = 1024
# The first bytes of an Arrow file; a stream, as datasets writes, has none.
ARROW_FILE_MAGIC = b"ARROW1"
# The last bytes of a stream that its writer has closed.
ARROW_STREAM_END = bytes(4)


def read_parquet(path: Path, key: str) -> Iterator[RawChunk]:
    """Yields the rows of a Parquet file's column `key`. DataError if the file is damaged or has no such texts."""
    import_pyarrow(path)
    from pyarrow import parquet

    with _reporting_damage(path):
        # Without read-ahead, which would hold whole row groups.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES, page_checksum_verification=True)
    with file:
        with _reporting_damage(path):
            _check_column(path, file.schema_arrow, key)
        metadata, size = file.metadata, path.stat().st_size
        first = 1
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            with _reporting_damage(path):
                batch_rows = _rows_per_batch(path, metadata.row_group(group), key)
            batches = file.iter_batches(batch_rows, [group], [key], False)
            while True:
                with _reporting_damage(path):
                    batch = next(batches, None)
                if batch is None:
                    break
                position = size * (first + batch.num_rows) // max(metadata.num_rows, 1)
                yield from _read_rows(path, batch.column(0), first, min(position, size))
                first += batch.num_rows
                rows -= batch.num_rows
            if rows:
                raise _damaged_table(path, f"{rows} rows less than its row group {group} states")


def _rows_per_batch(path: Path, group: object, key: str) -> int:
    """Returns how many rows of a row group have about CHUNK_BYTES. DataError if the group has another column."""
    columns = (group.column(index) for index in range(group.num_columns))
    size = next((column.total_uncompressed_size for column in columns if column.path_in_schema == key), None)
    if size is None:
        raise _damaged_table(path, f"a row group without its column {key!r}")
    return max(1, min(MAX_BATCH_ROWS, CHUNK_BYTES * group.num_rows // max(size, 1)))


def read_arrow(path: Path, key: str) -> Iterator[RawChunk]:
    """Yields the rows of an Arrow stream's or file's column `key`. DataError if it is damaged or has no such texts."""
    pyarrow = import_pyarrow(path)
    size = path.stat().st_size
    if not size:
        raise _damaged_table(path, "an empty file")
    with path.open("rb") as raw:
        # Closed by its last reference: batches point into it.
        mapping = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
    yield from _read_batches(path, key, pyarrow.py_buffer(mapping), mapping)


def _read_batches(path: Path, key: str, buffer: object, mapping: mmap.mmap) -> Iterator[RawChunk]:
    import pyarrow
    from pyarrow import ipc

    is_file = mapping[: len(ARROW_FILE_MAGIC)] == ARROW_FILE_MAGIC
    open_reader = ipc.open_file if is_file else ipc.open_stream
    with _reporting_damage(path):
        schema = open_reader(buffer).schema
        _check_column(path, schema, key)
    if not is_file and mapping[-len(ARROW_STREAM_END) :] != ARROW_STREAM_END:
        raise _damaged_table(path, "no end of the stream")
    # All columns: a reader of one copies whole batches, where this one points into the mapping.
    options = ipc.IpcReadOptions(use_threads=False)
    source = pyarrow.BufferReader(buffer)
    with _reporting_damage(path):
        reader = open_reader(source, options=options)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
    first = 1
    while True:
        with _reporting_damage(path):
            batch = next(batches, None)
        if batch is None:
            return
        column = batch.column(key)
        rows = max(1, min(MAX_BATCH_ROWS, CHUNK_BYTES * len(column) // max(column.nbytes, 1)))
        for start in range(0, len(column), rows):
            part = column.slice(start, rows)
            with _reporting_damage(path):
                part.validate(full=True)
            yield from _read_rows(path, part, first + start, source.tell())
            # Pages that were read count as this process's memory until they are given back.
            mapping.madvise(mmap.MADV_DONTNEED)
        first += len(column)


def _read_rows(path: Path, column: object, first: int, position: int) -> Iterator[RawChunk]:
    """Yields the texts of a column in chunks; the first row has the number `first`."""
    import pyarrow

    large = pyarrow.types.is_large_string(column.type)
    with _reporting_damage(path):
        texts = column.cast(pyarrow.large_string() if large else pyarrow.string())
        contents = texts.cast(pyarrow.large_binary() if large else pyarrow.binary())
    rows: list[bytes | None] = []
    size = 0
    for text in contents:
        rows.append(text.as_py())
        size += len(rows[-1] or b"")
        if size >= CHUNK_BYTES:
            yield RawChunk(str(path), position, tuple(rows), unit="row", first=first)
            first += len(rows)
            rows, size = [], 0
    if rows:
        yield RawChunk(str(path), position, tuple(rows), unit="row", first=first)


def _check_column(path: Path, schema: object, key: str) -> None:
    from pyarrow import types

    names = schema.names
    if names.count(key) != 1:
        hint = "Name the column of the text with --json-key."
        raise DataError(Problem(str(path), f"one column {key!r}", f"the columns {names[:20]}", hint))
    kind = schema.field(key).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)):
        hint = "Name the column of the text with --json-key."
        raise DataError(Problem(f"{path}, column {key!r}", "texts (string)", str(kind), hint))


@contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    """Turns the library's errors into DataError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        # Errors of the disk have a number, those of the format none.
        if isinstance(error, OSError) and error.errno:
            raise
        raise _damaged_table(path, (str(error) or type(error).__name__).splitlines()[0].rstrip(".")) from None


def _damaged_table(path: Path, found: str) -> DataError:
    hint = "It is truncated or damaged: copy it again."
    return DataError(Problem(str(path), f"a complete {path.suffix} file", found, hint))

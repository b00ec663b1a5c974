"""Every kind of text file: what is read, cut, skipped and refused, by the command's own functions."""

from __future__ import annotations

import gzip
import json
from itertools import product
from pathlib import Path

import pytest

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus import json_documents, plain_text, raw_chunks
from megatron_ligo.data.corpus.plain_text import Separator, plan_cuts
from megatron_ligo.data.documents import BadLines, DocumentSource

DOCUMENTS = [f"document {index}, é🙂 " * (index % 40 + 1) for index in range(300)]


def write_json_lines(path: Path, texts: list[str] = DOCUMENTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()
    path.write_bytes({".gz": gzip.compress, ".zst": compress_zstandard}.get(path.suffix, bytes)(data))
    return path


def compress_zstandard(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, "zstd", asbytes=True)


def write_parquet(path: Path, texts: list[str | None] = DOCUMENTS, **options) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, **options)
    return path


def write_arrow(path: Path, texts: list[str | None] = DOCUMENTS, kind: str = "stream") -> Path:
    """Writes an Arrow stream, as datasets does, or a file."""
    pyarrow = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": texts, "id": range(len(texts))})
    open_writer = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as stream, open_writer(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return path


def read(*paths: Path, **options) -> list[str]:
    return list(DocumentSource(tuple(paths), **options))


def problems(error: pytest.ExceptionInfo) -> list[Problem]:
    return list(error.value.problems)


# Kinds of files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst"])
def test_json_lines(name, tmp_path):
    assert read(write_json_lines(tmp_path / name)) == DOCUMENTS


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [300, 1 << 18])
def test_a_json_array(indent, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ligo.data.corpus.byte_streams.CHUNK_BYTES", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text, "more": [1, {"a": "]"}]} for text in DOCUMENTS], indent=indent))
    assert read(path) == DOCUMENTS
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(DataError, match=r"a\.json: expected JSON lines, or one array of objects"):
        read(path)
    path.write_text(whole + "{}")
    with pytest.raises(DataError, match="after its closing bracket"):
        read(path)


def test_bad_items_of_a_json_array_have_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, 3, {"text": "b"}, {"text": None}, {"text": "c"}]))
    with pytest.raises(DataError) as error:
        read(path)
    assert [problem.where for problem in problems(error)] == ["item 2", "item 4"]
    assert read(path, on_bad_line="skip") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "options", [{}, {"row_group_size": 64}, {"compression": "zstd", "use_dictionary": False}, {"data_page_size": 500}]
)
def test_parquet(options, tmp_path):
    assert read(write_parquet(tmp_path / "a.parquet", **options)) == DOCUMENTS


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow(kind, tmp_path):
    assert read(write_arrow(tmp_path / "a.arrow", kind=kind)) == DOCUMENTS


def test_texts_of_other_string_types(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for index, kind in enumerate(
        [pyarrow.large_string(), pyarrow.string_view(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    ):
        table = pyarrow.table({"text": pyarrow.array(DOCUMENTS).cast(kind)})
        parquet.write_table(table, tmp_path / f"{index}.parquet")
        assert read(tmp_path / f"{index}.parquet") == DOCUMENTS, kind


def test_columns_without_text_are_refused(tmp_path):
    for path in (write_parquet(tmp_path / "a.parquet"), write_arrow(tmp_path / "a.arrow")):
        with pytest.raises(DataError, match="found the columns") as missing:
            read(path, json_key="body")
        assert "--json-key" in problems(missing)[0].hint and problems(missing)[0].where == str(path)
        with pytest.raises(DataError, match="found int64"):
            read(path, json_key="id")


def test_a_parquet_file_whose_parts_name_the_column_otherwise_is_refused(tmp_path):
    """In turn: its schema, the metadata of a row group."""
    path = write_parquet(tmp_path / "a.parquet", ["one", "two"])
    data, refused = path.read_bytes(), []
    places = [place for place in range(len(data)) if data.startswith(b"text", place)]
    for name, place in product((b"texy", b"te\xffy"), places):
        path.write_bytes(data[:place] + name + data[place + 4 :])
        with pytest.raises(DataError) as error:
            read(path)
        refused.append(problems(error)[0].found)
    assert len(places) >= 2 and "a row group without its column 'text'" in refused


def test_rows_without_a_text_are_bad_lines(tmp_path):
    texts = ["a", None, "b", None]
    for path in (write_parquet(tmp_path / "a.parquet", texts), write_arrow(tmp_path / "a.arrow", texts)):
        with pytest.raises(DataError) as error:
            read(path)
        assert [problem.where for problem in problems(error)] == ["row 2", "row 4"]
        assert read(path, on_bad_line="skip") == ["a", "b"]


def test_plain_text_keeps_its_meaning(tmp_path):
    """Whole, with \\n for every line end, compressed or not."""
    data = "\ufeffone\r\n\r\n two\rthree \x00\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(data))
    assert read(tmp_path / "a.txt", tmp_path / "b.md.gz") == [(tmp_path / "a.txt").read_text("utf-8")] * 2


@pytest.mark.parametrize("cut", [1, 20, 200])
@pytest.mark.parametrize("write", [write_json_lines, write_parquet, write_arrow])
def test_truncated_files_are_refused(write, cut, tmp_path):
    suffixes = {write_json_lines: [".jsonl.gz", ".jsonl.zst"], write_parquet: [".parquet"], write_arrow: [".arrow"]}
    for suffix in suffixes[write]:
        path = write(tmp_path / f"a{suffix}")
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DataError) as error:
            read(path)
        (problem,) = problems(error)
        assert problem.where == str(path) and f"a complete {path.suffix} file" in problem.expected
        path.write_bytes(b"")
        with pytest.raises(DataError, match="a complete"):
            read(path)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    paths = [tmp_path / "a.parquet", tmp_path / "a.arrow", tmp_path / "a.jsonl.zst"]
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for path in paths:
        path.write_bytes(b"anything")
        with pytest.raises(DataError, match="the package pyarrow") as error:
            read(path)
        assert "pip install pyarrow" in problems(error)[0].hint


# Separators


PIECES = {
    "\n\n": ["a\nb", "c", "d"],
    "\n \t\n\n": ["a", "b "],
    "\n<|endoftext|>\n": ["a\n\nb", "c"],
    "<|endoftext|>": [" a", "b ", "c"],
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("separator", PIECES, ids=repr)
def test_cut_text(separator, chunk, tmp_path, monkeypatch):
    """The size of the blocks that are read changes nothing."""
    monkeypatch.setattr("megatron_ligo.data.corpus.byte_streams.CHUNK_BYTES", chunk)
    monkeypatch.setattr(plain_text, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    text = separator.join(["", *PIECES[separator], "", ""])
    path.write_bytes(text.replace("\n", "\r\n").encode())
    cut_at = Separator("" if not separator.strip() else "<|endoftext|>")
    assert read(path, cuts={path: cut_at}) == PIECES[separator]


@pytest.mark.parametrize("compressed", [False, True])
def test_automatic_cuts(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "LARGE_TEXT_BYTES", 1000)

    def write(name: str, text: str) -> Path:
        path = tmp_path / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        return path

    small, large = write("small.txt", "a\n\nb"), write("large.txt", "word word\n\n" * 200)
    marked = write("marked.txt", "line\n\nline\n<|endoftext|>\n" * 200)
    plan = plan_cuts([small, large, marked], "auto", "</s>", ["<|endoftext|>"], lone=False)
    assert plan == {large: Separator(), marked: Separator("<|endoftext|>")}
    own = plan_cuts([marked], "auto", "line", ["<|endoftext|>"], lone=False)
    assert own == {marked: Separator("line")}
    assert plan_cuts([small], "auto", "</s>", [], lone=True) == {small: Separator()}
    endless = write("endless.txt", "word " * 2000)
    with pytest.raises(DataError, match=r"found none in its first .*--separator"):
        plan_cuts([endless], "auto", "</s>", [], lone=False)


def test_named_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a</s>b\n\nc---\n---\td")
    for option, expected in {
        "none": ["a</s>b\n\nc---\n---\td"],
        "end-token": ["a", "b\n\nc---\n---\td"],
        "blank-line": ["a</s>b", "c---\n---\td"],
        r"---\n---\t": ["a</s>b\n\nc", "d"],
    }.items():
        source = DocumentSource((path,), separator=option)
        assert list(source.cut("</s>", [], held_out=True)) == expected, option
    with pytest.raises(DataError, match="--separator xyz"):
        plan_cuts([path], "xyz", "</s>", [], lone=False)
    with pytest.raises(DataError, match="a plain text file to cut"):
        plan_cuts([], "blank-line", "</s>", [], lone=False)


def test_documents_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_text, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr("megatron_ligo.data.corpus.byte_streams.CHUNK_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_text("short\n\n" + "long " * 50)
    with pytest.raises(DataError, match="a document of at most"):
        plan_cuts([path], "none", "</s>", [], lone=False)
    for cuts in ({}, {path: Separator()}):
        with pytest.raises(DataError, match="a document of at most"):
            read(path, cuts=cuts)


@pytest.mark.parametrize("chunk", [10, 1 << 18])
def test_a_line_that_does_not_fit_is_bad(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ligo.data.corpus.byte_streams.CHUNK_BYTES", chunk)
    monkeypatch.setattr(json_documents, "MAX_LINE_BYTES", 100)
    path = write_json_lines(tmp_path / "a.jsonl", ["a", "long " * 100, "b", "c" * 500, "d"])
    if chunk == 10:
        with pytest.raises(DataError) as error:
            read(path)
        assert [problem.where for problem in problems(error)] == ["line 2", "line 4"]
        assert read(path, on_bad_line="skip") == ["a", "b", "d"]
    else:
        assert len(read(path)) == 5


# Bad lines

BAD_LINES = {
    rb'{"text": "\ud800"}': "lone surrogate U+D800",
    b'{"text":' + b"[" * 100_000: "nested too deeply",
    b"[" * 100_000: "nested too deeply",
    b'{"text": "\xff"}': "0xff",
    b'{"text": "\xed\xa0\x80"}': "0xed",
    b'{"tekst": "a"}': "tekst",
    b'{"text": ["a"]}': "list",
    b'{"text": null}': "NoneType",
    b'"text"': "str",
    b'{"text": "a"} {"text": "b"}': "JSONDecodeError",
    b'{"text": "a"': "JSONDecodeError",
    b'{"n": ' + b"9" * 5000 + b', "text": "a"}': "ValueError",
    b'{"text": "\x00"}': "JSONDecodeError",
    b"\x00\x00": "JSONDecodeError",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: str(line[:20]))
def test_bad_lines(bad, tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "a\\u0000b"}\n'
    path.write_bytes(good + b"\n" + bad + b"\n" + good + bad)
    with pytest.raises(DataError) as error:
        read(path)
    assert [problem.where for problem in problems(error)] == ["line 3", "line 5"]
    assert BAD_LINES[bad] in problems(error)[0].found and "--on-bad-line skip" in problems(error)[0].hint
    assert str(path) in str(error.value)
    assert read(path, on_bad_line="skip") == ["a\x00b"] * 2


def test_skipped_lines_are_counted_and_logged(tmp_path, caplog):
    source = DocumentSource((), on_bad_line="skip")
    bad_lines = BadLines(source)
    for number in range(1, 30):
        bad_lines.add("a.jsonl", [Problem(f"line {number}", "x", "y")], iter(()))
    assert bad_lines.counts == {"a.jsonl": 29}
    assert [record.message for record in caplog.records][:2] == [
        f"skipped: a.jsonl, line {number}: expected x, found y." for number in (1, 2)
    ]
    assert len(caplog.records) == 10


def test_a_bad_document_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\n\nb\n\xff\n\nc")
    with pytest.raises(DataError, match=r"document 2: expected UTF-8 text, found the byte 0xff .* line 2"):
        read(path, cuts={path: Separator()})
    assert read(path, cuts={path: Separator()}, on_bad_line="skip") == ["a", "c"]
    assert read(path, on_bad_line="skip") == []


def test_sizes_of_chunks(tmp_path):
    """Readers yield chunks of about the size that workers take, whatever the file."""
    path = write_json_lines(tmp_path / "a.jsonl", ["x" * 1000] * 3000)
    for file, documents in ((path, 3000), (write_json_lines(tmp_path / "a.jsonl.gz", ["x" * 1000] * 3000), 3000)):
        chunks = list(DocumentSource((file,)).read_chunks())
        assert max(chunk.size for chunk in chunks) <= 2 * raw_chunks.CHUNK_BYTES
        assert sum(len(raw_chunks.parse_chunk(chunk, "text").texts) for chunk in chunks) == documents
        assert [chunk.position for chunk in chunks] == sorted(chunk.position for chunk in chunks)
        assert chunks[-1].position == file.stat().st_size


@pytest.mark.parametrize("blanks", ["\n", " \n", "\n ", "\n" + " " * 1000])
@pytest.mark.parametrize("separator", [Separator(), Separator("<|endoftext|>")], ids=str)
def test_many_blank_lines_take_no_time(blanks, separator, tmp_path):
    """A pattern that tries each of them as a start takes hours."""
    path = tmp_path / "a.txt"
    run = "\n" + blanks * (1_000_000 // len(blanks)) + "\n"
    path.write_text(f"{run}a{run}<|endoftext|>{run}b{run}")
    expected = ["a", "<|endoftext|>", "b"] if not separator.text else ["a", "b"]
    assert read(path, cuts={path: separator}) == expected

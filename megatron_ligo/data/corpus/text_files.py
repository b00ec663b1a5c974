"""Finds the text files at the given paths, by suffix and by the conventions of Hugging Face's data folders."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import DataError, ErrorCollector
from megatron_ligo.data.corpus.byte_streams import COMPRESSIONS
from megatron_ligo.data.corpus.json_documents import read_json_file, read_json_lines
from megatron_ligo.data.corpus.plain_text import Separator, read_text_documents
from megatron_ligo.data.corpus.raw_chunks import RawChunk, parse_chunk
from megatron_ligo.data.corpus.table_documents import read_arrow, read_parquet

log = logging.getLogger(__name__)

PLAIN_SUFFIXES = (".txt", ".md", ".py")
JSON_SUFFIXES = (".jsonl", ".json")
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = (*PLAIN_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES)
# What lies beside data files and describes them.
CARDS = re.compile(r"(readme|license|licence|notice|citation|contributing|changelog)\b.*", re.IGNORECASE)
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Results that datasets caches beside its data.
CACHES = re.compile(r"(cache-|tmp).*\.arrow")
SHARD = re.compile(r"(?P<split>.*?)[-.]?(?P<index>\d{5})-of-(?P<count>\d{5})\b.*")
SPLIT_NAMES = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}


@dataclass(frozen=True)
class TextSelection:
    """files: the text files, in order. notes: what was skipped and what looks odd, for the user."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def text_suffix(path: Path) -> str:
    """Returns the suffix that says how a file is read, without that of its compression; empty for other files."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    if suffix not in SUFFIXES or (suffix in TABLE_SUFFIXES and path.suffix in COMPRESSIONS):
        return ""
    return suffix


def read_file(path: Path, json_key: str, separator: Separator | None) -> Iterator[RawChunk]:
    """Yields a text file's documents in chunks, in order. DataError if the file is damaged."""
    suffix = text_suffix(path)
    if suffix == ".jsonl":
        return read_json_lines(path)
    if suffix == ".json":
        return read_json_file(path, json_key)
    if suffix == ".parquet":
        return read_parquet(path, json_key)
    if suffix == ".arrow":
        return read_arrow(path, json_key)
    return read_text_documents(path, separator)


def select_text_files(paths: Sequence[str], json_key: str = "text", allow_skipped: bool = False) -> TextSelection:
    """Lists the text files at `paths`; a folder is searched recursively and sorted. DataError with every bad path.

    A folder whose files of other kinds outweigh its text is refused, unless `allow_skipped`.
    """
    errors = ErrorCollector("texts", DataError)
    files: list[Path] = []
    notes: list[str] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            search = FolderSearch(path, json_key)
            search.check(name, allow_skipped, errors)
            files += search.files
            notes += search.notes(name)
        elif not path.is_file():
            errors.add(name, "a file or a folder", "neither", "Check the path.")
        elif not text_suffix(path):
            expected = f"one of {', '.join(SUFFIXES)}, or text with {' or '.join(COMPRESSIONS)} after it"
            errors.add(name, expected, path.suffix or "no suffix")
        else:
            files.append(path)
    errors.raise_if_any()
    return TextSelection(tuple(files), (*notes, *_describe_shards(files)))


class FolderSearch:
    """The text files of one folder, and a tally of the others. Hidden files and folders are not searched."""

    def __init__(self, folder: Path, json_key: str):
        self.skipped: dict[str, list[Path]] = defaultdict(list)
        self.described: list[Path] = []
        children = sorted(path for path in folder.rglob("*") if not _is_hidden(path, folder) and path.is_file())
        stored = _read_state_files(children)
        candidates = [path for path in children if self._is_text(path, json_key, stored)]
        # A loading script or a card is text only where there is nothing else.
        has_data = any(text_suffix(path) not in PLAIN_SUFFIXES for path in candidates)
        self.files = [path for path in candidates if not (has_data and self._describes_data(path, folder))]

    def _is_text(self, path: Path, json_key: str, stored: dict[Path, set[str]]) -> bool:
        suffix = text_suffix(path)
        if path.name in DESCRIPTIONS or (suffix == ".arrow" and _is_cached(path, stored)):
            self.described.append(path)
            return False
        kind = "" if suffix else path.suffix or "no suffix"
        # Settings are never compressed.
        if path.suffix == ".json" and not _begins_with_text(path, json_key):
            kind = f".json without a text under {json_key!r}"
        if kind:
            self.skipped[kind].append(path)
        return not kind

    def _describes_data(self, path: Path, folder: Path) -> bool:
        plain = text_suffix(path) in PLAIN_SUFFIXES
        is_card = plain and (CARDS.fullmatch(path.name) or path.name == f"{folder.resolve().name}.py")
        if is_card:
            self.described.append(path)
        return bool(is_card)

    def check(self, name: str, allow_skipped: bool, errors: ErrorCollector) -> None:
        """Adds an error if the folder has no text, or less than other files."""
        taken = {path.resolve() for path in self.files}
        size = sum(path.stat().st_size for path in taken)
        # A link and its target are one file, as in a download cache.
        others = {path.resolve() for paths in self.skipped.values() for path in paths} - taken
        skipped_size = sum(path.stat().st_size for path in others)
        if not self.files:
            kinds = f"only {self._tally()}" if self.skipped or self.described else "no file"
            errors.add(name, f"text files ({', '.join(SUFFIXES)}, or with {' or '.join(COMPRESSIONS)})", kinds)
        elif skipped_size > size and not allow_skipped:
            found = f"{size} bytes of text and {self._tally()}"
            errors.add(name, "mostly text", found, "Name the files to read, or pass --allow-skipped.")

    def notes(self, name: str) -> list[str]:
        return [f"{name}: skipped {self._tally()}"] if self.skipped or self.described else []

    def _tally(self) -> str:
        kinds = [(kind, paths) for kind, paths in sorted(self.skipped.items())]
        kinds += [(f"{path.name} (beside the data)", [path]) for path in self.described[:5]]
        kinds += [("more beside the data", self.described[5:])] if self.described[5:] else []
        return ", ".join(f"{len(p)} {kind} ({sum(f.stat().st_size for f in p)} bytes)" for kind, p in kinds)


def _is_hidden(path: Path, folder: Path) -> bool:
    """True below a hidden folder or Python's compiled files, which lie beside any sources that were imported."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)


def _read_state_files(files: Sequence[Path]) -> dict[Path, set[str]]:
    """Returns by folder the data files that a state.json of datasets' save_to_disk lists."""
    stored = {}
    for path in files:
        if path.name == "state.json":
            try:
                stored[path.parent] = {str(entry["filename"]) for entry in read_json(path)["_data_files"]}
            except (ValueError, KeyError, TypeError):
                continue
    return stored


def _is_cached(path: Path, stored: dict[Path, set[str]]) -> bool:
    if path.parent in stored:
        return path.name not in stored[path.parent]
    return bool(CACHES.fullmatch(path.name))


def _begins_with_text(path: Path, json_key: str) -> bool:
    """True if the first record of a .json file has a text: others are settings, not data."""
    try:
        chunk = next(read_json_file(path, json_key), None)
    except DataError:
        return False
    if chunk is None:
        return False
    parsed = parse_chunk(chunk, json_key)
    first_problem = parsed.problems[0].where if parsed.problems else ""
    return bool(parsed.texts) and first_problem.split()[-1:] != ["1"]


def _describe_shards(files: Sequence[Path]) -> Iterator[str]:
    """Yields a note for each set of numbered shards with gaps, and one if splits are mixed."""
    shards = Counter()
    splits = set()
    for path in files:
        match = SHARD.fullmatch(path.name)
        if match:
            shards[path.parent / match["split"], int(match["count"])] += 1
        named = {match["split"] if match else path.name.split(".")[0], path.parent.name}
        if text_suffix(path) not in PLAIN_SUFFIXES:
            splits |= named & SPLIT_NAMES
    for (prefix, count), present in shards.items():
        if present < count:
            yield f"{prefix}: {present} of {count} shards are there"
    if len(splits) > 1:
        yield f"the splits {', '.join(sorted(splits))} are mixed and split anew: name one's files to keep them apart"

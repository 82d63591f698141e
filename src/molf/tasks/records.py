"""Records from a user's files, each with its location: JSON, JSON Lines, CSV and Parquet, and folders of these."""

import csv
import gzip
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from molf.errors import MolfError
from molf.tasks.base import Row

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")
Located: TypeAlias = tuple[str, Row]
"""A record's location, for error messages, and the record."""

Splits: TypeAlias = dict[str, Iterable[Located]]
"""Records by split: ``train``, ``validation`` and ``test``, or ``UNNAMED`` alone."""
UNNAMED = ""
"""The split of files whose names do not tell their split."""

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    "test": "test",
}
_JSON_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a number",
    type(None): "null",
}  # fmt: skip


def local_splits(path: Path) -> Splits:
    """Return the records of a file, of a folder of files, or of a folder saved by ``datasets``.

    In a folder, a file belongs to the split whose name is a word of the file's or its subfolder's name:
    ``train-00000-of-00001.parquet``, ``medmcqa_dev.jsonl``, ``test/part1.csv``. Files are sorted by name; hidden ones are
    left out.
    """
    if not path.exists():
        raise MolfError(f"no file or folder {path}")
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise MolfError(f"{path}: cannot tell the format; the name must end in one of {', '.join(SUFFIXES)}")
        return {UNNAMED: records_of(path)}
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        from datasets import load_from_disk

        return located_splits(load_from_disk(str(path)), str(path))
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and file.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in name.parts):
            words = re.split(r"[^a-z]+", name.as_posix().lower())
            split = next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), UNNAMED)
            by_split[split].append(file)
    if not by_split:
        raise MolfError(f"no {', '.join(SUFFIXES)} file in the folder {path}")
    if UNNAMED in by_split and len(by_split) > 1:
        raise MolfError(
            f"{by_split[UNNAMED][0]}: cannot tell the split; other files have one, so this name must contain one of the "
            f"words {', '.join(_SPLIT_WORDS)}"
        )
    return {split: chain.from_iterable(map(records_of, files)) for split, files in by_split.items()}


def located_splits(loaded: Any, origin: str) -> Splits:
    """Return the records of what ``datasets`` loaded, a ``Dataset`` or a ``DatasetDict``."""

    def located(rows: Iterable[Any], where: str) -> Iterator[Located]:
        return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))

    if not isinstance(loaded, dict):
        return {UNNAMED: located(loaded, origin)}
    names = {str(split): rows for split, rows in loaded.items()}
    return {_SPLIT_WORDS.get(name, name): located(rows, f"{origin}, split {name}") for name, rows in names.items()}


def records_of(file: Path) -> Iterator[Located]:
    """Yield the records of a file: JSON (one list of objects), JSON Lines, CSV with a header, or Parquet."""
    read: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".parquet": _parquet_records, ".csv": _csv_records}
    for where, record in read.get(file.suffix, _json_records)(file):
        if not isinstance(record, dict):
            raise MolfError(f"{where}: expected an object with named fields, found {json_name(record)}")
        yield where, record


def _json_records(file: Path) -> Iterator[tuple[str, Any]]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        # Not str.splitlines: JSON strings may contain other line separators, such as U+2028.
        for number, line in enumerate(_read_text(file).split("\n"), start=1):
            if line.strip():
                yield f"{file}, line {number}", _parse_json(line, f"{file}, line {number}")
        return
    records = _parse_json(_read_text(file), str(file))
    if not isinstance(records, list):
        raise MolfError(f"{file}: expected one list of records, found {json_name(records)}")
    for number, record in enumerate(records, start=1):
        yield f"{file}, record {number}", record


def _csv_records(file: Path) -> Iterator[Located]:
    rows = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    line = 1
    try:
        header = next(rows, [])
        line = rows.line_num + 1
        for cells in rows:  # a record is located by its first line
            if cells and len(cells) != len(header):
                raise MolfError(f"{file}, line {line}: {len(cells)} cells, but the header has {len(header)} columns")
            if cells:
                yield f"{file}, line {line}", dict(zip(header, cells, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise MolfError(f"{file}, line {line}: not CSV: {error}") from error


def _parquet_records(file: Path) -> Iterator[Located]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise MolfError(f"{file}: not a complete Parquet file ({error})") from error
    records = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches())
    return ((f"{file}, row {number}", record) for number, record in enumerate(records, start=1))


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MolfError(f"{file}: not a complete gzip file ({error})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MolfError(f"{file}, line {line}: not UTF-8 ({error.reason})") from error
    except OSError as error:
        raise MolfError(f"{file}: cannot be read: {error.strerror}") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        inside = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise MolfError(f"{where}: not JSON: {error.msg} at {inside}") from error


def check_fields(record: Row, fields: Mapping[str, type], where: str) -> None:
    """Check the types of a record's fields; a dot in a name goes into an object (``"rewrite.prompt": str``)."""
    for name, expected in fields.items():
        value: Any = record
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                there = ", ".join(value) if isinstance(value, dict) else json_name(value)
                raise MolfError(f"{where}: no field {name!r}; {key!r} is missing from: {there or 'nothing'}")
            value = value[key]
        if not isinstance(value, expected):
            raise MolfError(f"{where}: field {name!r} must be {_JSON_NAMES[expected]}, found {json_name(value)}")


def json_name(value: Any) -> str:
    """Return what JSON calls a value, with its article."""
    return _JSON_NAMES.get(type(value), type(value).__name__)

"""Reading records from a user's files: JSON, JSON Lines, CSV and Parquet, each with the place where it stands."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from molf.tasks.base import Row

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")
Located: TypeAlias = tuple[str, Row]
"""Where a record stands, for messages, and the record."""


def read_records(file: Path, fields: Mapping[str, type]) -> list[Row]:
    """Read the records of one file.

    Args:
        file: As for ``records_of``.
        fields: As for ``check_fields``.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a record is not usable; the message says which line and why.
    """
    rows = []
    for where, row in records_of(file):
        check_fields(row, fields, where)
        rows.append(row)
    return rows


def record_files(path: Path) -> list[Path]:
    """Return the file itself, or the files with records in a folder and its subfolders, in the order of their names.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If the file's name does not tell its format.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path}: cannot tell the format; the name must end in one of {', '.join(SUFFIXES)}")
        return [path]
    found = [file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES)]
    visible = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not visible:
        raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file in the folder {path}")
    return visible


def records_of(file: Path) -> Iterator[Located]:
    """Yield the records of one file.

    Args:
        file: A ``.json`` file (one list of objects) or a ``.jsonl`` file (one object a line), either also ``.gz``, a
            ``.csv`` file with a header, or a ``.parquet`` file.

    Raises:
        ValueError: If the file or a record is broken.
    """
    if file.suffix == ".parquet":
        yield from _parquet_records(file)
    elif file.suffix == ".csv":
        yield from _csv_records(file)
    elif file.name.endswith((".jsonl", ".jsonl.gz")):
        # Not str.splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
        for number, line in enumerate(_read_text(file).split("\n"), start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _as_object(_parse_json(line, where), where)
    else:
        records = _parse_json(_read_text(file), str(file))
        if not isinstance(records, list):
            raise ValueError(f"{file}: expected one list of records, found {json_name(records)}")
        for number, record in enumerate(records, start=1):
            where = f"{file}, record {number}"
            yield where, _as_object(record, where)


def _csv_records(file: Path) -> Iterator[Located]:
    rows = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    first = 2  # a record is named by the line that it begins on
    try:
        for row in rows:
            where = f"{file}, line {first}"
            if None in row or None in row.values():
                given = len([cell for name, cell in row.items() if name and cell is not None]) + len(
                    row.get(None) or ()
                )
                raise ValueError(f"{where}: {given} cells, but the header has {len(rows.fieldnames or ())} columns")
            yield where, row
            first = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {first}: not CSV: {error}") from error


def _parquet_records(file: Path) -> Iterator[Located]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file}: not a whole Parquet file ({error})") from error
    number = 0
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", record


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{file}: not a whole gzip file ({error})") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 ({error.reason})") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        inside = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{where}: not JSON: {error.msg} at {inside}") from error


def _as_object(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with named fields, found {json_name(record)}")
    return record


def check_fields(record: Row, fields: Mapping[str, type], where: str) -> None:
    """Raise a ValueError that names the place if a record lacks a field or has it in another type.

    Args:
        record: The record.
        fields: What it must have, as names and types; a dot goes into an object (``"rewrite.prompt": str``).
        where: The place.
    """
    for name, expected in fields.items():
        value: Any = record
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                there = ", ".join(value) if isinstance(value, dict) else json_name(value)
                raise ValueError(f"{where}: no field {name!r}; looking for {key!r} among: {there or 'nothing'}")
            value = value[key]
        if not isinstance(value, expected):
            raise ValueError(f"{where}: field {name!r} must be {_NAMES[expected]}, found {json_name(value)}")


_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def json_name(value: Any) -> str:
    """Return what a value is called in JSON, with its article."""
    return _NAMES.get(type(value), type(value).__name__)

"""Records from one file, each with its location: JSON, JSON Lines, CSV, TSV and Parquet."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from molf.errors import MolfError
from molf.tasks.base import Row

READ = ".json, .jsonl, .ndjson, .csv and .tsv, also compressed (such as .jsonl.gz, .bz2, .xz, .zst), and .parquet"
"""What can be read, in words."""
Located: TypeAlias = tuple[str, Row]
"""A record's location, for error messages, and the record."""

JSON_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a number",
    type(None): "null",
}  # fmt: skip
_LONGEST_CELL = 2**31 - 1  # in characters; the csv module's own limit is 131,072
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def is_readable(name: str) -> bool:
    """Return whether a file's name tells a format that can be read."""
    return _format(name)[0] in _READERS


def records_of(file: Path) -> Iterator[Located]:
    """Yield the records of a file: JSON (one list of objects), JSON Lines, CSV or TSV with a header, or Parquet."""
    for where, record in _READERS[_format(file.name)[0]](file):
        if not isinstance(record, dict):
            raise MolfError(f"{where}: expected an object with named fields, found {json_name(record)}")
        yield where, record


def json_name(value: Any) -> str:
    """Return what JSON calls a value, with its article."""
    return JSON_NAMES.get(type(value), type(value).__name__)


def _format(name: str) -> tuple[str, str]:
    """Return the ending that tells the format, and that of a compression; Parquet compresses by itself."""
    suffixes = ["", "", *Path(name.lower()).suffixes]
    if suffixes[-1] in _DECOMPRESS and suffixes[-2] != ".parquet":
        return suffixes[-2], suffixes[-1]
    return suffixes[-1], ""


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    return _lines(file, _read_text(file))


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not str.splitlines: JSON strings may contain other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _whole_characters(line, parse_json(line, where), where)


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    try:
        records = parse_json(text, str(file))
    except MolfError as error:
        if getattr(error.__cause__, "msg", "") != "Extra data":
            raise
        yield from _lines(file, text)  # JSON Lines, as `datasets` names them
        return
    if not isinstance(records, list):
        raise MolfError(f"{file}: expected one list of records, found {json_name(records)}")
    for number, record in enumerate(records, start=1):
        yield _whole_characters(text, record, f"{file}, record {number}")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON text that holds nothing twice and is not too deep; ``where`` begins the error message."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        inside = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise MolfError(f"{where}: not JSON: {error.msg} at {inside}") from error
    except ValueError as error:  # a repeated name, or an integer with more digits than Python reads
        raise MolfError(f"{where}: {error}") from error
    except RecursionError as error:
        raise MolfError(f"{where}: lists and objects are nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; json would keep the last of several values of one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(
            f"the name {_repeated([name for name, _ in pairs])!r} occurs twice in one object; keep one of them"
        )
    return found


def _repeated(names: Sequence[str]) -> str | None:
    return next((name for number, name in enumerate(names) if name in names[:number]), None)


def _whole_characters(text: str, value: Any, where: str) -> tuple[str, Any]:
    """Check that a value parsed from ``text`` has no half of a character, which no tokenizer and no file takes."""
    if _SURROGATE_ESCAPE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise MolfError(
                f"{where}: {half} is half of a character (a lone surrogate); remove or complete it"
            ) from error
    return where, value


def _csv_records(file: Path, dialect: str = "excel") -> Iterator[Located]:
    csv.field_size_limit(_LONGEST_CELL)
    rows = csv.reader(io.StringIO(_read_text(file), newline=""), dialect, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in rows:  # a record is located by its first line
            if cells and not header:
                header = cells
                if (twice := _repeated(header)) is not None:
                    raise MolfError(f"{file}, line {line}: the column {twice!r} occurs twice; rename or remove one")
            elif cells and len(cells) != len(header):
                raise MolfError(f"{file}, line {line}: {len(cells)} cells, but the header has {len(header)} columns")
            elif cells:
                yield f"{file}, line {line}", dict(zip(header, cells, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise MolfError(f"{file}, line {line}: not {'CSV' if dialect == 'excel' else 'TSV'}: {error}") from error


def _tsv_records(file: Path) -> Iterator[Located]:
    return _csv_records(file, "excel-tab")


def _parquet_records(file: Path) -> Iterator[Located]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        if (twice := _repeated(table.schema_arrow.names)) is not None:
            raise MolfError(f"{file}: the column {twice!r} occurs twice; rename or remove one")
        records = chain.from_iterable(batch.to_pylist() for batch in table.iter_batches())
        for number, record in enumerate(records, start=1):
            yield f"{file}, row {number}", record
    except MolfError:
        raise
    except (ArrowException, OSError, ValueError) as error:
        raise MolfError(f"{file}: not a complete Parquet file ({error})") from error


def _read_text(file: Path) -> str:
    compression = _format(file.name)[1]
    try:
        return _DECOMPRESS.get(compression, bytes)(file.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise MolfError(f"{file}, line {line}: not UTF-8 ({error.reason})") from error
    except (EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as error:
        if getattr(error, "strerror", None):
            raise MolfError(f"{file}: cannot be read: {error.strerror}") from error  # type: ignore[union-attr]
        raise MolfError(f"{file}: not a complete {_COMPRESSION_NAMES[compression]} file ({error})") from error


def _whole_streams(decompressor: Callable[[], Any]) -> Callable[[bytes], bytes]:
    """Return a function that decompresses one stream after another; the modules' own drop what follows the last one."""

    def decompress(data: bytes) -> bytes:
        found = []
        while True:
            stream = decompressor()
            found.append(stream.decompress(data))
            if not stream.eof:
                raise EOFError("it ends before its end marker")
            data = stream.unused_data
            if not data.strip(b"\0"):  # padding between and after streams
                return b"".join(found)
            data = data.lstrip(b"\0")

    return decompress


def _unzstd(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read())


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json_list,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".parquet": _parquet_records,
}
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": _whole_streams(bz2.BZ2Decompressor),
    ".xz": _whole_streams(lzma.LZMADecompressor),
    ".zst": _unzstd,
}
_COMPRESSION_NAMES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}

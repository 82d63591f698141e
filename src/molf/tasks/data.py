"""Loading the records of a benchmark: local JSON files, and published files that are downloaded once."""

import gzip
import http.client
import json
import os
import shutil
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molf.tasks.base import Row

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TIMEOUT_SECONDS = 60


def read_records(path: str | os.PathLike[str], fields: Mapping[str, type] | None = None) -> list[Row]:
    """Read the records of a file, or of all such files of a folder in the order of their names.

    Args:
        path: A ``.json`` file (one list of objects), a ``.jsonl`` file (one object a line), either also ``.gz``, or
            a folder of such files.
        fields: What every record must have, as names and types; a dot goes into an object (``"rewrite.prompt": str``).

    Raises:
        FileNotFoundError: If there is nothing at ``path``, or no such file in the folder.
        ValueError: If a record is not usable; the message says which file, which line and why.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    records = []
    for file in _record_files(path):
        for where, record in _records_of(file):
            _check_fields(record, fields or {}, where)
            records.append(record)
    if not records:
        raise ValueError(f"{path}: no records")
    return records


def _record_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file in the folder {path}")
        return files
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: cannot tell the format; the name must end in one of {', '.join(SUFFIXES)}")
    return [path]


def _records_of(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield ``(where it stands, record)`` for every record of one file."""
    text = _read_text(file)
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        # Not str.splitlines: JSON strings may hold other line separators, such as U+2028, as they are.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _as_object(_parse_json(line, where), where)
        return
    records = _parse_json(text, str(file))
    if not isinstance(records, list):
        raise ValueError(f"{file}: expected one list of records, found {_json_name(records)}")
    for number, record in enumerate(records, start=1):
        where = f"{file}, record {number}"
        yield where, _as_object(record, where)


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
        raise ValueError(f"{where}: expected an object with named fields, found {_json_name(record)}")
    return record


def _check_fields(record: Row, fields: Mapping[str, type], where: str) -> None:
    for name, expected in fields.items():
        value: Any = record
        for key in name.split("."):
            if not isinstance(value, dict) or key not in value:
                there = ", ".join(value) if isinstance(value, dict) else _json_name(value)
                raise ValueError(f"{where}: no field {name!r}; looking for {key!r} among: {there or 'nothing'}")
            value = value[key]
        if not isinstance(value, expected):
            raise ValueError(f"{where}: field {name!r} must be {_NAMES[expected]}, found {_json_name(value)}")


_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


def _json_name(value: Any) -> str:
    return _NAMES[type(value)]


def cache_folder() -> Path:
    """Return the folder for downloads: ``$MOLF_CACHE``, else ``molf`` in the user's cache folder."""
    if chosen := os.environ.get("MOLF_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "molf"


def download_once(url: str, folder: Path) -> Path:
    """Return the local copy of a published file, downloading it if it is not there yet.

    Args:
        url: The file's address; its last part becomes the name of the copy.
        folder: Where the copy is kept. It is made if missing.

    Raises:
        ConnectionError: If the file is not there and cannot be had, or the network is switched off by
            ``HF_HUB_OFFLINE`` or ``HF_DATASETS_OFFLINE``.
    """
    target = folder / Path(urllib.parse.urlsplit(url).path).name
    if target.exists():
        return target
    if switch := next((name for name in _OFFLINE_SWITCHES if _is_on(name)), None):
        raise ConnectionError(_no_download(url, f"{switch} is set"))
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as partial:
        try:
            _download(url, partial)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(_no_download(url, str(error) or type(error).__name__)) from error
    return target


def _download(url: str, target: Path) -> None:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
        announced = response.headers.get("Content-Length")
        # A connection that closes early looks like the end of the file to copyfileobj.
        if announced is not None and file.tell() != int(announced):
            raise OSError(f"got {file.tell()} of {announced} bytes")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _no_download(url: str, reason: str) -> str:
    return (
        f"cannot download {url}: {reason}. "
        "Either pass a copy of the file with --data_path FILE, or use the small slice in the package with --sample."
    )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that takes its place at the end, or vanishes on an error."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)

"""Files and folders that are written whole or not at all, the cache, and JSON files that may be damaged or someone else's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from molf.errors import MolfError

__all__ = [
    "NotWritable",
    "atomic_folder",
    "atomic_write",
    "cache_folder",
    "is_stream",
    "read_json",
    "typed",
    "write_errors",
]

_DEEPEST = 100  # levels; Python's own limit depends on its version and on the caller
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
}


class NotWritable(MolfError, OSError):
    """A file or folder cannot be written where the user wants it."""


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``target`` at the end, or is removed after an error.

    What a path names is kept: the file behind a symlink is replaced, and the new file has the old one's mode and owner. Streams
    (see ``is_stream``) are written to and stay what they are.

    Raises:
        NotWritable: ``target`` is a folder or a disk, or it or its folder cannot be made or written.
    """
    if is_stream(target):
        with tempfile.TemporaryDirectory() as folder:
            yield (partial := Path(folder) / target.name)
            _send(partial, target)
        return
    real = Path(os.path.realpath(target))
    partial = real.with_name(f".{real.name}.{os.getpid()}.partial")
    try:
        with write_errors(target):
            real.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.touch(exist_ok=False)  # never through a symlink that someone else left here
            in_place = real.exists() and not _resembles(partial, real)
        yield partial
        if in_place:
            _send(partial, real)
        else:
            os.replace(partial, real)
    finally:
        with suppress(OSError):
            partial.unlink()


def is_stream(target: Path) -> bool:
    """Return whether a path names a pipe, a terminal, ``/dev/null`` or this process's own output, which nothing may replace.

    Raises:
        NotWritable: It names a folder or a disk, or cannot be looked up.
    """
    with write_errors(target):
        try:
            found = os.stat(target)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISBLK(found.st_mode):
            raise OSError(errno.EPERM, "it is a block device")
    return not stat.S_ISREG(found.st_mode) or _own_output(found) is not None


def _own_output(found: os.stat_result) -> int | None:
    """Return which standard stream of this process a file is, if it is one: a shell may have sent it to a regular file."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _send(partial: Path, target: Path) -> None:
    """Write the contents of a file into another that stays."""
    with write_errors(target):
        if (own := _own_output(os.stat(target))) is not None:
            sys.stdout.flush()
            descriptor = os.dup(own)
        else:  # an error, not a wait, for a pipe that nobody reads
            descriptor = os.open(target, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
        with partial.open("rb") as source, os.fdopen(descriptor, "wb") as file:
            shutil.copyfileobj(source, file)


def _resembles(partial: Path, real: Path) -> bool:
    """Give a new file the mode, attributes and owner of an old one; False if its owner has to stay another."""
    if not os.access(real, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    before, now = real.stat(), partial.stat()
    try:
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            os.chown(partial, before.st_uid, before.st_gid)
        shutil.copystat(real, partial)
    except PermissionError:
        return False
    return True


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn errors of the file system into ``NotWritable``, but for that of a full disk (``/dev/full`` is none)."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC and not target.is_char_device():
            raise
        raise NotWritable(f"cannot write {target}: {error.strerror}; choose another path") from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that is renamed to it at the end, or removed after an error.

    Raises:
        NotWritable: The folder of ``target`` cannot be made or written.
        OSError: ``target`` exists at the end and is not an empty folder.
    """
    real = Path(os.path.realpath(target))  # a symlink stays
    partial = real.with_name(f".{real.name}.{os.getpid()}.partial")
    with write_errors(target):
        partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, real)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cache_folder() -> Path:
    """Return the folder for what is made or downloaded once: ``$MOLF_CACHE``, or ``molf`` in the user's cache folder."""
    if chosen := os.environ.get("MOLF_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molf"


def read_json(file: Path, kind: Any = Any) -> Any:
    """Read a JSON file as a value of a type (see ``typed``).

    Raises:
        MolfError: What is wrong, without the file's name: it is not JSON, or not of that type; lists are nested too deeply; an
            integer exceeds 64 bits; a string has half of a character (a lone surrogate), which no file takes.
        OSError: The file cannot be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MolfError(f"not JSON ({str(error).splitlines()[0]})") from error
    _check(value)
    return typed(kind, value)


def _check(value: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise MolfError(f"more than {_DEEPEST} lists and objects are nested")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MolfError(f"half of a character, {value[error.start]!r}") from error
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise MolfError("an integer of more than 64 bits")
    elif isinstance(value, dict | list):
        for item in value if isinstance(value, list) else [*value, *value.values()]:
            _check(item, depth + 1)


def typed(kind: Any, value: Any, where: str = "") -> Any:
    """Return a JSON value as a value of a declared type.

    Args:
        kind: ``Any``, a plain type, ``dict[str, ...]``, a dataclass of such types, or one of these or None; int fits float.
        value: The value.
        where: Where it was found, for the error message.

    Raises:
        MolfError: It is of another type; an object lacks a field or has one too many.
    """
    if kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        (inner,) = set(get_args(kind)) - {NoneType}
        return None if value is None else typed(inner, value, where)
    plain = dict if is_dataclass(kind) else get_origin(kind) or kind
    number = kind is float and isinstance(value, int)
    if not (isinstance(value, plain) or number) or (isinstance(value, bool) and kind is not bool):
        raise MolfError(f"{where or 'the file'} must be {_NAMES[plain]}, found {_name_of(value)}")
    if is_dataclass(kind):
        return _build(kind, value, where)
    if plain is dict:
        return {name: typed(get_args(kind)[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    return float(value) if number else value


def _build(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    inside = f" in {where}" if where else ""
    if missing := [name for name in required if name not in value]:
        raise MolfError(f"no {', '.join(missing)}{inside}")
    if unknown := sorted(value.keys() - hints.keys()):
        raise MolfError(f"unknown {', '.join(unknown)}{inside}")
    return kind(**{name: typed(hints[name], item, f"{where}.{name}".lstrip(".")) for name, item in value.items()})


def _name_of(value: Any) -> str:
    return "null" if value is None else _NAMES[type(value)]

"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from molf.errors import MolfError

__all__ = ["NotWritable", "atomic_folder", "atomic_write"]


class NotWritable(MolfError, OSError):
    """A file or folder cannot be written where the user wants it."""


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` that replaces it at the end, or is removed after an error.

    Raises:
        NotWritable: ``target`` is a folder, or its folder cannot be made or written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            partial.touch()
        yield partial
        os.replace(partial, target)
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise NotWritable(f"cannot write {target}: {error.strerror}; choose another path") from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target`` that is renamed to it at the end, or removed after an error.

    Raises:
        NotWritable: The folder of ``target`` cannot be made or written.
        OSError: ``target`` exists at the end and is not an empty folder.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with _explained(target):
        partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""One run at a time in a folder: every process of a run locks its byte of a file beside it. Nothing here imports torch."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molf.errors import MolfError

_log = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold this process's part of the lock of a run's folder: the byte of its rank in ``.NAME.running``.

    POSIX locks end with their process, are not inherited by children, and work over NFS. ``filelock`` has no byte ranges, which
    let each rank hold its own part. Without support for locks, a warning is logged and nothing is kept out.

    Raises:
        MolfError: The same rank of another run works there.
    """
    file = lock_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _log.warning("cannot lock %s (%s): nothing keeps a second run out of %s", file, error.strerror, folder)
        yield
        return
    try:
        if not _taken(descriptor, file, first=int(os.environ.get("RANK", "0")), length=1):
            raise MolfError(f"another run is working in {folder}; wait until it ends, or choose another --output_dir")
        yield
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Return whether any process of a run works in a folder, on this machine or another that shares it.

    The lock is shared, which needs no right to write. A process that works there itself must not ask: closing the file would
    release its own lock.

    Raises:
        MolfError: The lock cannot be read.
    """
    file = lock_file(folder)
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise MolfError(
            f"cannot tell whether a run works in {folder}: {file}: {error.strerror}; make it readable"
        ) from error
    try:
        return not _taken(descriptor, file, first=0, length=0, kind=fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def lock_file(folder: Path) -> Path:
    """Return the file that the processes of a run lock, the same for every path to the folder; it stays when they end."""
    whole = Path(os.path.realpath(folder))
    return whole.with_name(f".{whole.name}.running")


def _taken(descriptor: int, file: Path, first: int, length: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock some bytes (length 0: all that follow) and return True, or False if another process holds them."""
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB, length, first)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("cannot lock %s (%s): nothing keeps a second run out", file, error.strerror)
    return True

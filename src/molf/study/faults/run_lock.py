"""One run at a time in a folder: every process of a run holds a lock on a file beside it while it works there.

Nothing here imports torch.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold this process's part of the lock on a run's folder: the byte of its rank in ``.NAME.running``.

    The lock is POSIX's, which ends with the process that took it, is no child's, and reaches over NFS. Where there are no locks,
    or the file cannot be made, that is said and nothing is kept out.

    Args:
        folder: The run's folder, which need not be there.

    Raises:
        ValueError: The process of this rank of another run works there.
    """
    file = lock_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _log.warning("%s cannot be locked (%s): nothing keeps a second run out of %s", file, error.strerror, folder)
        yield
        return
    try:
        if not _taken(descriptor, file, first=int(os.environ.get("RANK", "0")), length=1):
            raise ValueError(
                f"another run works in {folder} and has not ended yet; wait for it, or choose another output_dir"
            )
        yield
    finally:
        os.close(descriptor)


def in_use(folder: Path) -> bool:
    """Say whether any process of a run works in a folder, on this machine or another that shares it.

    A process that works there itself must not ask: closing the file again would give up its own lock.
    """
    try:
        descriptor = os.open(lock_file(folder), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _taken(descriptor, lock_file(folder), first=0, length=0)
    finally:
        os.close(descriptor)


def lock_file(folder: Path) -> Path:
    """Return the file that the processes of a run lock; it stays when they are gone."""
    whole = folder.absolute()
    return whole.with_name(f".{whole.name}.running")


def _taken(descriptor: int, file: Path, first: int, length: int) -> bool:
    """Take the lock on some bytes (0 for all that follow), and say whether that was possible: another process may have it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, first)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        _log.warning("%s cannot be locked (%s): nothing keeps a second run out", file, error.strerror)
    return True

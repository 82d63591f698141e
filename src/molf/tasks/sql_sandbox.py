"""Runs SQL that a model wrote, which may be anything, without harm.

Every query runs in an empty in-memory SQLite database in a worker process (``sql_worker``), which has an empty environment
and an empty working folder. What keeps it there, from the inside out:

- SQLite's authorizer allows queries and changes of ordinary tables only, so no ATTACH (which VACUUM needs), DETACH, PRAGMA,
  virtual or temporary tables, and no ``load_extension`` or functions on files. SQLite's own limits bound lengths, depths and
  the size of programs (Python 3.11 and later).
- A progress handler ends a query at its time limit; results are bounded in rows and bytes.
- The operating system lets the worker open nothing, no file and no socket, write to no file, and have no more memory than its
  limit (Linux; macOS ignores that, so SQLite's own limit on its heap is set too; Windows has none of these).
- This process kills a worker that does not answer in time or not in the agreed form, replaces it and goes on. Answers are JSON
  of bounded size; nothing in them is believed before it was looked at.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Lock, Timer
from typing import Any, cast

from molf.tasks import sql_worker
from molf.tasks.sql_worker import MEBIBYTE, read_frame, write_frame

Row = tuple[Any, ...]

_GRACE_SECONDS = 1.0  # for a worker to end a query by itself
_START_SECONDS = 60.0
_FLOOR_BYTES = 64 * MEBIBYTE  # what Python and SQLite themselves need


@dataclass(frozen=True)
class Execution:
    """What came of a query.

    Attributes:
        ok: Whether it ran to its end within the limits.
        rows: The rows of the result, values being None, int, float, str or bytes. Of a statement that has none, such as
            INSERT, the rows of all tables afterwards, each led by its table's name, after one row for each table. None if
            not ``ok``.
        error: Why it did not run, or None. Begins with ``context:`` if the fault is in what was to be there before.
    """

    ok: bool
    rows: list[Row] | None
    error: str | None


@dataclass(frozen=True)
class Limits:
    """What one query may use.

    Attributes:
        seconds: Wall time.
        memory: Bytes of address space of a worker.
        rows: Rows of a result.
        bytes: Bytes of a result's values.
        length: Characters of context and query together.
    """

    seconds: float = 5.0
    memory: int = 512 * MEBIBYTE
    rows: int = 10_000
    bytes: int = 8 * MEBIBYTE
    length: int = 200_000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.memory < _FLOOR_BYTES:
            raise ValueError(f"memory={self.memory} is less than the {_FLOOR_BYTES} bytes that a worker itself needs")


class SqlSandbox:
    """Worker processes that run SQL; a context manager, which starts them and leaves none behind.

    Args:
        workers: How many queries run at a time.
        limits: What each may use.

    Attributes:
        replaced: How many workers died or had to be killed so far; each took the one query that it had with it.
    """

    def __init__(self, workers: int = 2, limits: Limits | None = None):
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self.replaced = 0
        self._count, self._limits = workers, limits or Limits()
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._lock = Lock()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "SqlSandbox":
        """Start the workers.

        Raises:
            OSError: A worker does not start.
        """
        with ExitStack() as unless_all_start:
            unless_all_start.push(self)
            self._folder = tempfile.TemporaryDirectory(prefix="molf-sql-")
            for _ in range(self._count):
                self._idle.put(_Worker(self._folder.name, self._limits))
            unless_all_start.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """End the workers."""
        while not self._idle.empty():
            self._idle.get().stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def execute(self, context: str, sql: str) -> Execution:
        """Run a query in a database of its own.

        Args:
            context: Statements that make its tables.
            sql: The query; of several statements the last result counts.

        Raises:
            RuntimeError: Outside a ``with`` block.
            OSError: If a worker has to be replaced and the new one does not start.
        """
        if self._folder is None:
            raise RuntimeError("a SqlSandbox has workers inside a with block only: with SqlSandbox() as sandbox: ...")
        if len(context) + len(sql) > self._limits.length:
            return _failed(f"more than {self._limits.length} characters")
        try:
            request = json.dumps({"context": context, "sql": sql}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return _failed("not valid Unicode")
        worker = self._idle.get()
        try:
            if not worker.alive:
                worker = _Worker(self._folder.name, self._limits)
            found = worker.ask(request)
            if not worker.alive:
                with self._lock:
                    self.replaced += 1
            return found
        finally:
            self._idle.put(worker)

    def execute_many(self, queries: Iterable[tuple[str, str]]) -> list[Execution]:
        """Run many queries, as many at a time as there are workers.

        Args:
            queries: Pairs of context and query.

        Returns:
            What came of each, in their order.
        """
        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(lambda query: self.execute(*query), queries))


class _Worker:
    """One worker process."""

    def __init__(self, folder: str, limits: Limits):
        self._limits = limits
        self.alive = True
        self._late = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(sql_worker.__file__), json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,  # an interrupt at the keyboard is for the run, which then ends its workers
        )
        if self._exchange(None, _START_SECONDS) is None:
            raise OSError(
                f"a worker for SQL does not start: {sys.executable} ended with status {self._process.returncode}"
            )

    def ask(self, request: bytes) -> Execution:
        """Have a query run; afterwards the worker may be dead."""
        reply = self._exchange(request, self._limits.seconds + _GRACE_SECONDS)
        if reply is None:
            late = f"took longer than {self._limits.seconds} s"
            return _failed(late if self._late else f"ended its worker (status {self._process.returncode})")
        found = _as_execution(reply)
        if found is None:
            self.stop()
            return _failed("made its worker answer with nonsense")
        return found

    def _exchange(self, request: bytes | None, seconds: float) -> bytes | None:
        """Send a frame, if there is one, and return the answer; None if the worker is of no more use, and ended.

        It is ended too where this is interrupted: its answer would be taken for that to the next query.
        """
        source, sink = cast(Any, self._process.stdin), cast(Any, self._process.stdout)
        watchdog = Timer(seconds, self._end_late)
        watchdog.daemon = True
        watchdog.start()
        reply = None
        try:
            with suppress(BrokenPipeError):
                if request is not None:
                    write_frame(source, request)
                # JSON takes up to 12 bytes for a character.
                reply = read_frame(sink, most=16 * self._limits.bytes + 4096)
        finally:
            watchdog.cancel()
            watchdog.join()
            if reply is None or self._late:
                self.stop()
        return reply if self.alive else None

    def _end_late(self) -> None:
        self._late = True
        self._process.kill()

    def stop(self) -> None:
        """End the process and wait until it is gone."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # of what it did not read
                cast(Any, pipe).close()


def _failed(error: str) -> Execution:
    return Execution(False, None, error)


def _as_execution(reply: bytes) -> Execution | None:
    """Read a worker's answer; None if it is not in the agreed form."""
    try:
        match json.loads(reply):
            case {"error": str(error)}:
                return _failed(error)
            case {"rows": list(rows)} if all(isinstance(row, list) for row in rows):
                return Execution(True, [tuple(map(_value, row)) for row in rows], None)
    except (ValueError, RecursionError):
        pass
    return None


def _value(cell: Any) -> Any:
    match cell:
        case None | int() | float() | str():
            return cell
        case {"blob": str(digits)}:
            return bytes.fromhex(digits)
    raise ValueError(f"not a value of SQLite: {cell!r}")

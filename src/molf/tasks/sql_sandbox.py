"""Runs SQL that a model wrote, which may be anything, without harm.

Every query runs in an empty in-memory SQLite database in a worker process (``sql_worker``) with an empty environment and an
empty working folder. What contains it, from the inside out:

- SQLite's authorizer allows queries and changes of ordinary tables only: no ATTACH (which VACUUM needs), DETACH, PRAGMA,
  virtual or temporary tables, ``load_extension``, or functions on files. SQLite's own limits bound lengths, depths and
  program sizes (Python 3.11 and later).
- A progress handler ends a query at its time limit. Results are bounded in rows and bytes.
- The operating system lets the worker open no file and no socket, write to no file, and use no more memory than its limit
  (Linux; macOS ignores the memory limit, so SQLite's own heap limit is set as well).
- This process kills and replaces a worker that does not answer in time or not in the agreed form. Answers are JSON of
  bounded size, checked before use.
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
from threading import Event, Timer
from typing import Any, cast

from molf.errors import MolfError
from molf.tasks import sql_worker
from molf.tasks.sql_worker import MEBIBYTE

Row = tuple[Any, ...]

_GRACE_SECONDS = 1.0  # for a worker to end a query by itself
_START_SECONDS = 60.0


@dataclass(frozen=True)
class Execution:
    """The outcome of a query.

    Attributes:
        ok: Whether it ran to its end within the limits.
        rows: The rows of the result, with values None, int, float, str or bytes. For a statement without a result, such as
            INSERT, the rows of all tables afterwards: one row per table name, then each table's rows led by its name. None
            if not ``ok``.
        error: Why it did not run, or None. Starts with ``context:`` if the context did not run.
    """

    ok: bool
    rows: list[Row] | None
    error: str | None


@dataclass(frozen=True)
class Limits:
    """What one query may use.

    Attributes:
        seconds: Wall time.
        memory: Bytes of a worker's address space; Python and SQLite themselves need 64 MiB.
        rows: Rows of a result.
        bytes: Bytes of a result's values.
        length: Characters of context and query together.
    """

    seconds: float = 5.0
    memory: int = 512 * MEBIBYTE
    rows: int = 10_000
    bytes: int = 8 * MEBIBYTE
    length: int = 200_000


class SqlSandbox:
    """Worker processes that run SQL; a context manager that starts them and leaves none behind.

    Args:
        workers: Number of queries to run at a time.
        limits: What each may use.
    """

    def __init__(self, workers: int = 2, limits: Limits | None = None):
        self._count, self._limits = workers, limits or Limits()
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._stack = ExitStack()

    def __enter__(self) -> "SqlSandbox":
        """Start the workers.

        Raises:
            MolfError: A worker does not start.
        """
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="molf-sql-"))
            self._workers = [_Worker(folder, self._limits) for _ in range(self._count)]
            for worker in self._workers:
                stack.callback(worker.stop)
                worker.start()
                self._idle.put(worker)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers."""
        self._workers = []
        self._stack.close()

    @property
    def replaced(self) -> int:
        """How many workers had to be replaced so far; each took only its own query with it."""
        return sum(worker.failures for worker in self._workers)

    def execute(self, context: str, sql: str) -> Execution:
        """Run a query in a database of its own.

        Args:
            context: Statements that create its tables.
            sql: The query; of several statements, the last result counts.

        Raises:
            MolfError: A worker has to be replaced and the new one does not start.
        """
        assert self._workers, "use a SqlSandbox in a with block"
        if len(context) + len(sql) > self._limits.length:
            return _failed(f"more than {self._limits.length} characters")
        try:
            request = json.dumps({"context": context, "sql": sql}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return _failed("not valid Unicode")
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)

    def execute_many(self, queries: Iterable[tuple[str, str]]) -> list[Execution]:
        """Run pairs of context and query, as many at a time as there are workers, and return their outcomes in order."""
        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(lambda query: self.execute(*query), queries))


class _Worker:
    """A worker process, started again after a failure."""

    def __init__(self, folder: str, limits: Limits):
        self.folder, self._limits = folder, limits
        self.process: subprocess.Popen[bytes] | None = None
        self.failures = 0

    def start(self) -> None:
        process = self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(sql_worker.__file__), json.dumps(asdict(self._limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={},
            start_new_session=True,  # Ctrl-C goes to the run, which then stops its workers
        )
        if not self._exchange(process, b"", _START_SECONDS)[0]:
            raise MolfError(f"an SQL worker does not start: {sys.executable} ended with status {process.returncode}")

    def ask(self, request: bytes) -> Execution:
        """Run a query, after starting a process if the last one failed."""
        if self.process is None:
            self.start()
        process = cast(subprocess.Popen[bytes], self.process)
        reply, late = self._exchange(process, request + b"\n", self._limits.seconds + _GRACE_SECONDS)
        if found := _as_execution(reply):
            return found
        self.stop()
        self.failures += 1
        if reply:
            return _failed("made its worker answer with nonsense")
        slow = f"took longer than {self._limits.seconds} s"
        return _failed(slow if late else f"ended its worker (status {process.returncode})")

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> tuple[bytes, bool]:
        """Send a line. Return the reply, empty if the process had to be stopped, and whether its time was up."""
        late = Event()

        def kill() -> None:
            late.set()
            process.kill()

        watchdog = Timer(seconds, kill)
        watchdog.daemon = True
        watchdog.start()
        reply = b""
        try:
            with suppress(BrokenPipeError):
                cast(Any, process.stdin).write(request)
                cast(Any, process.stdin).flush()
                # JSON takes up to 12 bytes per character.
                reply = cast(Any, process.stdout).readline(16 * self._limits.bytes + 4096)
        finally:
            watchdog.cancel()
            watchdog.join()
            if late.is_set() or not reply.endswith(b"\n"):
                reply = b""
                self.stop()  # also after an interrupt: the reply would be taken for that to the next query
        return reply, late.is_set()

    def stop(self) -> None:
        """End the process and wait for it."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # of what it did not read
                cast(Any, pipe).close()


def _failed(error: str) -> Execution:
    return Execution(False, None, error)


def _as_execution(reply: bytes) -> Execution | None:
    """Return the outcome in a worker's reply, or None if the reply is not in the agreed form."""
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

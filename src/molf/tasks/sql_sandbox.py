"""Runs SQL that a model wrote, which may be anything, without harm.

Every query runs in an empty in-memory SQLite database in a worker process (``sql_worker``) with an empty environment and a
working folder that is gone. What contains it, from the inside out:

- SQLite's authorizer allows queries and changes of ordinary tables only: no ATTACH (which VACUUM needs), DETACH, PRAGMA,
  virtual or temporary tables, ``load_extension``, or functions on files. SQLite's own limits bound lengths, depths and
  program sizes (Python 3.11 and later).
- A progress handler ends a query at its time limit. Results are bounded in rows and bytes.
- The operating system lets the worker open no file and no socket, write to no file, and use no more memory than its limit
  (Linux; macOS ignores the memory limit, so SQLite's own heap limit is set as well). A worker of root becomes nobody.
- With pyseccomp and libseccomp (Linux), the system refuses every call but those for memory, time and its open pipes.
- This process kills and replaces a worker that does not answer in time or not in the agreed form. Answers are JSON of
  bounded size, checked before use.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from threading import Timer
from typing import Any, cast

from molf.errors import MolfError
from molf.tasks import sql_worker
from molf.tasks.sql_filter import filter_program
from molf.tasks.sql_worker import MEBIBYTE

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
    rows: list[tuple[Any, ...]] | None
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


@dataclass(frozen=True)
class SqlSandbox:
    """Runs SQL in worker processes, which end with every call.

    Attributes:
        workers: Number of queries to run at a time.
        limits: What each may use.
    """

    workers: int = 2
    limits: Limits = Limits()

    def execute(self, context: str, sql: str) -> Execution:
        """Run one query; see ``execute_many``, which starts fewer processes for several."""
        return self.execute_many([(context, sql)])[0]

    def execute_many(self, queries: Iterable[tuple[str, str]]) -> list[Execution]:
        """Run queries, each in a database of its own, and return their outcomes in order.

        Args:
            queries: Pairs of the statements that create a query's tables and the query; of several statements in a query, the
                last result counts.

        Raises:
            MolfError: A worker does not start.
        """
        requests = [json.dumps({"context": context, "sql": sql}).encode() + b"\n" for context, sql in queries]
        todo = iter(enumerate(requests))
        workers = min(self.workers, len(requests)) or 1
        with ThreadPoolExecutor(workers) as pool:
            try:
                found = dict(chain.from_iterable(pool.map(lambda _: self._work(todo), range(workers))))
            finally:
                for _ in todo:  # after an error or an interrupt, workers finish their query and take no other
                    pass
        return [found[number] for number in range(len(requests))]

    def _work(self, todo: Iterator[tuple[int, bytes]]) -> list[tuple[int, Execution]]:
        """Answer requests until none is left, with a new process after each that fails."""
        found = []
        process: subprocess.Popen[bytes] | None = None
        try:
            for number, request in todo:
                process = process or self._start()
                reply, late = self._ask(process, request, self.limits.seconds + _GRACE_SECONDS)
                outcome = _as_execution(reply) if reply.endswith(b"\n") and not late else None
                if outcome is None:
                    _stop(process)
                    ended = "answered with nonsense" if reply else f"ended its worker (status {process.returncode})"
                    outcome = _failed(f"took longer than {self.limits.seconds} s" if late else ended)
                    process = None
                found.append((number, outcome))
        finally:
            if process is not None:
                _stop(process)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        given = json.dumps(asdict(self.limits)), filter_program().hex()
        try:
            # The worker's folder is gone as soon as it has started, so nothing can be put there.
            with tempfile.TemporaryDirectory(prefix="molf-sql-") as folder:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-B", str(sql_worker.__file__), *given],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={},
                    start_new_session=True,  # Ctrl-C goes to the run, which then stops its workers
                )
        except OSError as error:
            raise MolfError(f"an SQL worker does not start: {error}") from error
        if not self._ask(process, b"", _START_SECONDS)[0]:
            _stop(process)
            raise MolfError(f"an SQL worker does not start: {sys.executable} ended with status {process.returncode}")
        return process

    def _ask(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> tuple[bytes, bool]:
        """Send a line. Return the reply, empty if the process ended, and whether it was killed because its time was up."""
        began = time.monotonic()
        watchdog = Timer(seconds, process.kill)
        watchdog.daemon = True
        watchdog.start()
        reply = b""
        with suppress(BrokenPipeError):
            cast(Any, process.stdin).write(request)
            cast(Any, process.stdin).flush()
            # JSON takes up to 12 bytes per character.
            reply = cast(Any, process.stdout).readline(16 * self.limits.bytes + 4096)
        watchdog.cancel()
        watchdog.join()
        return reply, time.monotonic() - began >= seconds


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(BrokenPipeError), process:  # closes its pipes, whatever it did not read, and waits for it
        pass


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

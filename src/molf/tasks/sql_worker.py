"""The process that runs a model's SQL, with the standard library and SQLite in memory only.

Run as a script by ``molf.tasks.sql_sandbox``, which describes the containment, with the limits as JSON and the filter
of system calls in hex digits, empty if there is none. Reads one line of JSON per query from standard input and answers each with
one line on standard output. The first line out says that the limits are in place.

    in   {"context": "CREATE TABLE ...", "sql": "SELECT ..."}
    out  {"rows": [[1, "a", null, {"blob": "00ff"}], ...]}  or  {"error": "no such column: x"}
"""

import ctypes
import json
import math
import os
import re
import resource
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

MEBIBYTE = 2**20
_OPCODES_BETWEEN_CHECKS = 10_000
_MAX_STATEMENTS = 50
# Queries of and changes to the tables in memory. Everything else is denied: ATTACH, which VACUUM needs, DETACH, PRAGMA,
# virtual and temporary tables, and whatever SQLite adds.
_ALLOWED_ACTIONS = {
    getattr(sqlite3, f"SQLITE_{name}") for name in (
        "SELECT", "READ", "RECURSIVE", "FUNCTION", "INSERT", "UPDATE", "DELETE", "TRANSACTION", "SAVEPOINT", "CREATE_TABLE",
        "CREATE_INDEX", "CREATE_VIEW", "CREATE_TRIGGER", "DROP_TABLE", "DROP_INDEX", "DROP_VIEW", "DROP_TRIGGER",
        "ALTER_TABLE", "REINDEX", "ANALYZE",
    )
}  # fmt: skip
_DENIED_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob"}
_SQLITE_LIMITS = {  # sqlite3.SQLITE_LIMIT_*
    "LENGTH": 4 * MEBIBYTE, "COLUMN": 1000, "EXPR_DEPTH": 500, "COMPOUND_SELECT": 100, "VDBE_OP": 250_000,
    "ATTACHED": 0, "LIKE_PATTERN_LENGTH": 1000, "TRIGGER_DEPTH": 10, "WORKER_THREADS": 0,
}  # fmt: skip
_BLANK = re.compile(r"\s+|;+|--[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_NOBODY = 65534
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2  # linux/prctl.h, linux/seccomp.h


class TooMuch(Exception):
    """A query exceeds one of our limits."""


def limit_process(memory_bytes: int) -> None:
    """Limit memory, and forbid opening and writing files, core dumps and child processes, also to root."""
    # SQLite obeys this everywhere; macOS does not enforce its memory limit.
    database = sqlite3.connect(":memory:")
    database.execute(f"PRAGMA hard_heap_limit = {memory_bytes // 2}")
    database.close()
    for name, value in {"AS": memory_bytes, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 0}.items():
        lower_limit(name, value)
    if os.geteuid() == 0:
        with suppress(OSError):  # in some containers root may not change its user
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)  # gives up all capabilities, too


class _Program(ctypes.Structure):  # struct sock_fprog, of instructions of 8 bytes
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_calls(program: bytes) -> None:
    """Let Linux refuse system calls for good, as a program of ``sql_filter`` says; an empty one refuses none.

    Some containers forbid filters. What else contains the process then still does.
    """
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if program:
            whole = _Program(len(program) // 8, program)
            prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(whole), 0, 0)


def limit_cpu(seconds: float) -> None:
    """Let the system end this process after ``seconds`` more of processor time, in case its parent is gone."""
    lower_limit("CPU", math.ceil(time.process_time() + seconds) + 1, for_good=False)


def lower_limit(name: str, value: int, *, for_good: bool = True) -> None:
    """Set a resource limit of this process, if the system supports it."""
    number = getattr(resource, f"RLIMIT_{name}", None)
    if number is None:
        return
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(number, (value, value if for_good else hard))


def authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """Decide whether a statement may perform an action; SQLite asks while it compiles the statement."""
    denied = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED_FUNCTIONS
    return sqlite3.SQLITE_OK if action in _ALLOWED_ACTIONS and not denied else sqlite3.SQLITE_DENY


def connect(deadline: float) -> sqlite3.Connection:
    """Open an empty database in memory whose queries end at ``deadline`` on the monotonic clock."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("PRAGMA temp_store = MEMORY")
    database.execute("PRAGMA trusted_schema = OFF")
    if hasattr(database, "setlimit"):  # Python 3.11
        for name, value in _SQLITE_LIMITS.items():
            database.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), value)
    # Results may be invalid UTF-8 and must stay distinguishable.
    database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    database.set_authorizer(authorize)
    database.set_progress_handler(lambda: int(time.monotonic() > deadline), _OPCODES_BETWEEN_CHECKS)
    return database


def statements(script: str) -> Iterator[str]:
    """Split a script into its statements, except those of white space and comments."""
    pieces = script.split(";")
    if len(pieces) > 20 * _MAX_STATEMENTS:
        raise TooMuch(f"more than {20 * _MAX_STATEMENTS} semicolons")
    statement, found = "", 0
    for piece in pieces[:-1]:
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            found += 1
            if found > _MAX_STATEMENTS:
                raise TooMuch(f"more than {_MAX_STATEMENTS} statements")
            if not _is_blank(statement):
                yield statement
            statement = ""
    if not _is_blank(statement := statement + pieces[-1]):
        yield statement


def _is_blank(statement: str) -> bool:
    """Return whether a statement is white space and comments; piece by piece, because one pattern for all backtracks."""
    end = 0
    while piece := _BLANK.match(statement, end):
        end = piece.end()
    return end == len(statement)


def run(database: sqlite3.Connection, script: str, max_rows: int, max_bytes: int) -> list[list[Any]] | None:
    """Run all statements and return the rows of the last one that has a result, or None if none has."""
    rows: list[list[Any]] | None = None
    for statement in statements(script):
        cursor = database.execute(statement)
        if cursor.description is not None:
            rows = fetch(cursor, max_rows, max_bytes)
    return rows


def fetch(found: Iterable[Sequence[Any]], max_rows: int, max_bytes: int) -> list[list[Any]]:
    """Return the rows of a result."""
    rows: list[list[Any]] = []
    size = 0
    for row in found:
        if len(rows) == max_rows:
            raise TooMuch(f"more than {max_rows} rows")
        size += sum(map(_size, row))
        if size > max_bytes:
            raise TooMuch(f"a result of more than {max_bytes} bytes")
        rows.append([{"blob": value.hex()} if isinstance(value, bytes) else value for value in row])
    return rows


def _size(value: Any) -> int:
    text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
    return 8 + (len(text) if isinstance(text, bytes) else 0)


def contents(database: sqlite3.Connection, max_rows: int, max_bytes: int) -> list[list[Any]]:
    """Return all rows of all tables, each led by its table's name; the limits hold for all of them together."""
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]

    def led_by_names() -> Iterator[Sequence[Any]]:
        yield from ((name,) for name in names)
        for name in names:
            quoted = name.replace('"', '""')
            yield from ((name, *row) for row in database.execute(f'SELECT * FROM "{quoted}"'))

    return fetch(led_by_names(), max_rows, max_bytes)


def answer(request: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Run one query in a database of its own."""
    deadline = time.monotonic() + limits["seconds"]
    max_rows, max_bytes = limits["rows"], limits["bytes"]
    database = connect(deadline)
    where = ""
    try:
        if len(request["context"]) + len(request["sql"]) > limits["length"]:
            raise TooMuch(f"more than {limits['length']} characters")
        where = "context: "
        run(database, request["context"], max_rows, max_bytes)
        where = ""
        if next(statements(request["sql"]), None) is None:
            return {"error": "no statement"}
        rows = run(database, request["sql"], max_rows, max_bytes)
        return {"rows": contents(database, max_rows, max_bytes) if rows is None else rows}
    except sqlite3.OperationalError as error:
        late = time.monotonic() > deadline
        return {"error": f"{where}took longer than {limits['seconds']} s" if late else f"{where}{error}"}
    except (sqlite3.Error, sqlite3.Warning, TooMuch, ValueError, OverflowError, RecursionError) as error:
        return {"error": f"{where}{error}"}
    except MemoryError:
        return _out_of_memory(limits, where)
    finally:
        database.set_progress_handler(None, 0)
        database.close()


def _out_of_memory(limits: dict[str, Any], where: str = "") -> dict[str, Any]:
    return {"error": f"{where}more than {limits['memory'] // MEBIBYTE} MiB of memory"}


def main() -> None:
    """Answer queries until standard input ends."""
    limits = json.loads(sys.argv[1])
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")

    def reply(outcome: dict[str, Any]) -> None:
        sink.write(json.dumps(outcome).encode() + b"\n")
        sink.flush()

    # Load everything that is loaded late, before nothing can be opened any more.
    answer({"context": "CREATE TABLE t (x)", "sql": "SELECT x FROM t"}, limits)
    json.dumps({"rows": [[0.5, None, "\udcff"]]}).encode()
    limit_process(limits["memory"])
    filter_calls(bytes.fromhex(sys.argv[2]))
    reply({})
    while line := source.readline():
        limit_cpu(limits["seconds"])
        try:
            reply(answer(json.loads(line), limits))
        except MemoryError:
            reply(_out_of_memory(limits))


if __name__ == "__main__":
    main()

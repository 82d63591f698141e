"""What runs a model's SQL: a process of its own, with nothing but the standard library and SQLite in memory.

Run as a script by ``molf.tasks.sql_sandbox``, which explains what contains what. Reads a frame per query from standard
input and answers each with a frame on standard output; a frame is its length in 4 bytes, big-endian, and that much JSON. The
first frame out says that the limits are in place.

    in   {"context": "CREATE TABLE ...", "sql": "SELECT ..."}
    out  {"rows": [[1, "a", null, {"blob": "00ff"}], ...]}  or  {"error": "no such column: x"}
"""

import json
import math
import os
import re
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

MEBIBYTE = 2**20
_OPCODES_BETWEEN_CHECKS = 10_000
_MAX_STATEMENTS = 50
# Queries of, and changes to, the tables in memory. All else is denied: ATTACH, which VACUUM needs, DETACH, PRAGMA, virtual
# and temporary tables, and what SQLite may come to have.
_ALLOWED_ACTIONS = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_INSERT,
        sqlite3.SQLITE_UPDATE,
        sqlite3.SQLITE_DELETE,
        sqlite3.SQLITE_TRANSACTION,
        sqlite3.SQLITE_SAVEPOINT,
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_DROP_TRIGGER,
        sqlite3.SQLITE_ALTER_TABLE,
        sqlite3.SQLITE_REINDEX,
        sqlite3.SQLITE_ANALYZE,
    }
)
_DENIED_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob"})
_SQLITE_LIMITS = {  # a name of sqlite3.SQLITE_LIMIT_*: what a query may use of it
    "LENGTH": 4 * MEBIBYTE,
    "COLUMN": 1000,
    "EXPR_DEPTH": 500,
    "COMPOUND_SELECT": 100,
    "VDBE_OP": 250_000,
    "ATTACHED": 0,
    "LIKE_PATTERN_LENGTH": 1000,
    "TRIGGER_DEPTH": 10,
    "WORKER_THREADS": 0,
}


_EMPTY = re.compile(r"(?:\s|;|--[^\n]*(?:\n|$)|/\*(?s:.*?)\*/)*")


class TooMuch(Exception):
    """A limit of ours was reached."""


def limit_process(memory_bytes: int) -> None:
    """Give up what no query needs: memory beyond a limit, files, core dumps, children, and opening anything at all."""
    # SQLite keeps to this one everywhere; macOS has no limit on memory that holds.
    database = sqlite3.connect(":memory:")
    database.execute(f"PRAGMA hard_heap_limit = {memory_bytes // 2}")
    database.close()
    for name, value in {"AS": memory_bytes, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 3}.items():
        lower_limit(name, value)


def limit_cpu(seconds: float) -> None:
    """Have the system end this process after so much more processor time, should its parent be gone by then."""
    lower_limit("CPU", math.ceil(time.process_time() + seconds) + 1, for_good=False)


def lower_limit(name: str, value: int, *, for_good: bool = True) -> None:
    """Set a resource limit of this process, where the system has it and lets it be set."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows: the authorizer and the limits on time are all there is
        return
    number = getattr(resource, f"RLIMIT_{name}", None)
    if number is None:
        return
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with suppress(ValueError, OSError):  # macOS refuses some
        resource.setrlimit(number, (value, value if for_good else hard))


def authorize(action: int, first: str | None, second: str | None, database: str | None, source: str | None) -> int:
    """Tell SQLite whether a statement may do something; it asks while it compiles the statement."""
    if action not in _ALLOWED_ACTIONS:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _DENIED_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def connect(deadline: float) -> sqlite3.Connection:
    """Open an empty database in memory whose queries end at ``deadline`` (of the monotonic clock)."""
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("PRAGMA temp_store = MEMORY")
    database.execute("PRAGMA trusted_schema = OFF")
    if hasattr(database, "setlimit"):  # Python 3.11
        for name, value in _SQLITE_LIMITS.items():
            database.setlimit(getattr(sqlite3, f"SQLITE_LIMIT_{name}"), value)
    # Results need not be valid UTF-8; what is not stays distinguishable.
    database.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    database.set_authorizer(authorize)
    database.set_progress_handler(lambda: int(time.monotonic() > deadline), _OPCODES_BETWEEN_CHECKS)
    return database


def statements(script: str) -> Iterator[str]:
    """Cut a script into its statements, leaving out those of white space and comments.

    Raises:
        TooMuch: There are more than a query has any need of.
    """
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
            if not _EMPTY.fullmatch(statement):
                yield statement
            statement = ""
    if not _EMPTY.fullmatch(statement := statement + pieces[-1]):
        yield statement


def run(database: sqlite3.Connection, script: str, max_rows: int, max_bytes: int) -> list[list[Any]] | None:
    """Run all statements and return the rows of the last one that has a result, or None if none has."""
    rows: list[list[Any]] | None = None
    for statement in statements(script):
        cursor = database.execute(statement)
        if cursor.description is not None:
            rows = fetch(cursor, max_rows, max_bytes)
    return rows


def fetch(cursor: sqlite3.Cursor, max_rows: int, max_bytes: int) -> list[list[Any]]:
    """Return the rows of a result.

    Raises:
        TooMuch: It is larger than allowed.
    """
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        if len(rows) == max_rows:
            raise TooMuch(f"more than {max_rows} rows")
        size += sum(8 + len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if size > max_bytes:
            raise TooMuch(f"a result of more than {max_bytes} bytes")
        rows.append([{"blob": value.hex()} if isinstance(value, bytes) else value for value in row])
    return rows


def contents(database: sqlite3.Connection, max_rows: int, max_bytes: int) -> list[list[Any]]:
    """Return all rows of all tables, each led by its table's name: what a statement without a result has left."""
    names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    found: list[list[Any]] = [[name] for name in names]
    for name in names:
        quoted = name.replace('"', '""')
        rows = fetch(database.execute(f'SELECT * FROM "{quoted}"'), max_rows, max_bytes)
        found += [[name, *row] for row in rows]
        if len(found) > max_rows:
            raise TooMuch(f"more than {max_rows} rows in all tables")
    return found


def answer(request: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """Run one query in a database of its own."""
    deadline = time.monotonic() + limits["seconds"]
    max_rows, max_bytes = limits["rows"], limits["bytes"]
    database = connect(deadline)
    where = "context: "
    try:
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
        return {"error": f"{where}more than {limits['memory'] // MEBIBYTE} MiB of memory"}
    finally:
        database.set_progress_handler(None, 0)
        database.close()


def read_frame(stream: BinaryIO, most: int = 2**32) -> bytes | None:
    """Return the next frame, or None at the end of the stream or if the frame has more than ``most`` bytes."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack(">I", head)
    if size > most:
        return None
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: BinaryIO, body: bytes) -> None:
    """Write one frame."""
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def main() -> None:
    """Answer queries until standard input ends."""
    limits = json.loads(sys.argv[1])
    source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
    answer({"context": "CREATE TABLE t (x)", "sql": "SELECT x FROM t"}, limits)  # loads all that is loaded late
    json.dumps({"rows": [[0.5, None, "\udcff"]]}).encode()
    limit_process(limits["memory"])
    write_frame(sink, b"{}")
    while (frame := read_frame(source)) is not None:
        limit_cpu(limits["seconds"])
        try:
            reply = json.dumps(answer(json.loads(frame), limits))
        except MemoryError:
            reply = json.dumps({"error": f"more than {limits['memory'] // MEBIBYTE} MiB of memory"})
        write_frame(sink, reply.encode())


if __name__ == "__main__":
    main()

import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from molf.errors import MolfError
from molf.tasks.sql_sandbox import Limits, SqlSandbox

CONTEXT = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y');"
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
SECONDS = 1.0

# What a model might write, and what the answer has to say. None of it may run.
HOSTILE = {
    "attach": ("ATTACH DATABASE 'stolen.db' AS other", "not authorized"),
    "attach in memory": ("ATTACH ':memory:' AS other", "not authorized"),
    "detach": ("DETACH main", "not authorized"),
    "pragma": ("PRAGMA writable_schema = ON", "not authorized"),
    "pragma function": ("SELECT * FROM pragma_database_list", "not authorized|no such table|prohibited"),
    "vacuum into": ("VACUUM INTO 'copy.db'", "not authorized|authorization denied"),
    "load_extension": ("SELECT load_extension('evil.so')", "not authorized"),
    "readfile": ("SELECT readfile('/etc/passwd')", "not authorized|no such function"),
    "writefile": ("SELECT writefile('file.txt', 'x')", "not authorized|no such function"),
    "edit": ("SELECT edit('x', 'sh')", "not authorized|no such function"),
    "tokenizer": ("SELECT fts3_tokenizer('simple', x'00')", "not authorized|no such function"),
    "attach by URI": ("ATTACH 'file:stolen.db?mode=rwc' AS other", "not authorized"),
    "vacuum": ("VACUUM", "not authorized|authorization denied"),
    "temporary table": ("CREATE TEMP TABLE u AS SELECT 1", "not authorized"),
    "temporary view": ("CREATE TEMP VIEW u AS SELECT 1", "not authorized"),
    "heap limit": ("PRAGMA hard_heap_limit = 0", "not authorized"),
    "temporary folder": ("PRAGMA temp_store_directory = '/tmp'", "not authorized"),
    "pragma function of a table": ("SELECT * FROM pragma_table_info('t')", "not authorized|no such table|prohibited"),
    "schema": ("UPDATE sqlite_master SET sql = 'CREATE TABLE t (z)'", "may not be modified"),
    "into outfile": ("SELECT * FROM t INTO OUTFILE 'file.txt'", "syntax error"),
    "endless sort": (f"{ENDLESS} SELECT randomblob(1000) AS r FROM c ORDER BY r", "longer than|memory"),
    "endless insert": (f"INSERT INTO t {ENDLESS} SELECT x, randomblob(1000) FROM c", "longer than|memory|full"),
    "endless string": (f"{ENDLESS} SELECT group_concat(x) FROM c", "too big|longer than|memory"),
    "doubling": ("WITH RECURSIVE c(x) AS (SELECT 'a' UNION ALL SELECT x || x FROM c) SELECT max(x) FROM c", "too big|memory"),
    "deep subqueries": (f"SELECT * FROM {'(SELECT * FROM ' * 5000}t{')' * 5000}", "stack overflow|too deep|depth"),
    "many joins": (f"SELECT 1 FROM {', '.join(f't AS t{i}' for i in range(65))}", "at most 64 tables"),
    "virtual table": ("CREATE VIRTUAL TABLE v USING fts5(x)", "not authorized"),
    "virtual table of a file": ("CREATE VIRTUAL TABLE v USING csv(filename='/etc/passwd')", "not authorized"),
    "dot command": (".shell touch file.txt", "syntax error"),
    "recursion without end": (f"{ENDLESS} SELECT * FROM c", "more than 1000 rows|longer than"),
    "counting without end": (f"{ENDLESS} SELECT max(x) FROM c", "longer than"),
    "cartesian product": (f"SELECT count(*) FROM {', '.join(f't AS t{i}' for i in range(40))}", "longer than"),
    "result of many rows": (f"SELECT 1 FROM {', '.join(f't AS t{i}' for i in range(20))}", "more than 1000 rows"),
    "large blob": ("SELECT length(randomblob(1000000000))", "too big|memory"),
    "large zero blob": ("SELECT length(zeroblob(1000000000))", "not authorized"),
    "long text by format": ("SELECT length(printf('%.*c', 1000000000, 'x'))", "too big|memory|longer than"),
    "long text by replace": ("SELECT replace(hex(randomblob(900000)), '0', hex(randomblob(900000)))", "too big|memory"),
    "wide rows": ("SELECT hex(randomblob(900000)) FROM t, t AS u, t AS v", "more than 1048576 bytes"),
    "deep parentheses": (f"SELECT {'(' * 20_000}1{')' * 20_000}", "stack overflow|too deep|depth"),
    "deep expression": (f"SELECT 1{' + 1' * 20_000}", "too large|depth|stack"),
    "many statements": ("SELECT 1;" * 200, "more than 50 statements"),
    "many semicolons": (f"SELECT '{';' * 5000}'", "semicolons"),
    "null character": ("SELECT 'a\0b'", "null character"),
    "lone surrogate": ("SELECT '\ud800'", "not valid Unicode"),
    "megabytes": (f"SELECT '{'x' * 3_000_000}'", "more than 200000 characters"),
    "trigger without end": (
        "CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t VALUES (1, 'z'); END; PRAGMA recursive_triggers = ON",
        "not authorized",
    ),
    "nothing": (" ;; -- only a comment\n /* and another */", "no statement"),
    "prose": ("I cannot help with that.", "syntax error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox():
    with SqlSandbox(workers=1, limits=Limits(seconds=SECONDS, rows=1000, bytes=2**20)) as running:
        yield running


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statements_end_as_not_ok(sandbox, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sql, reason = HOSTILE[name]
    began = time.monotonic()
    found = sandbox.execute(CONTEXT, sql)
    assert not found.ok and found.rows is None
    assert re.search(reason, found.error), found.error
    assert time.monotonic() - began < SECONDS + 10  # the limit, the grace, and a new worker on a busy machine
    assert not list(tmp_path.iterdir()) and not os.listdir(sandbox._workers[0].folder)
    assert sandbox.execute(CONTEXT, "SELECT count(*) FROM t").rows == [(2,)]  # the next query is none the worse


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT * FROM t ORDER BY a DESC", [(2, "y"), (1, "x")]),
        ("SELECT 1.5, NULL, x'00ff', 'é'", [(1.5, None, b"\x00\xff", "é")]),
        ("SELECT 1; SELECT 2;", [(2,)]),
        ("SELECT a FROM t WHERE b = 'a;b'", []),
        ("SELECT CAST(x'ff' AS TEXT)", [("\udcff",)]),
        ("SELECT 9e999", [(float("inf"),)]),
        ("DELETE FROM t WHERE a = 1", [("t",), ("t", 2, "y")]),
        ("CREATE TABLE u AS SELECT b FROM t; DROP TABLE t", [("u",), ("u", "x"), ("u", "y")]),
    ],
)
def test_queries_give_their_rows(sandbox, sql, rows):
    found = sandbox.execute(CONTEXT, sql)
    assert (found.ok, found.rows, found.error) == (True, rows, None)


def test_every_query_has_a_database_of_its_own(sandbox):
    assert sandbox.execute(CONTEXT, "DROP TABLE t").ok
    assert sandbox.execute("", "SELECT * FROM t").error == "no such table: t"


def test_a_fault_in_the_context_is_told_from_one_in_the_query(sandbox):
    assert sandbox.execute("CREATE TABLE", "SELECT 1").error.startswith("context: ")


def test_many_queries_keep_their_order_and_a_dead_worker_is_replaced():
    bomb = "SELECT length(printf('%.*c', 1000000000, 'x'))"
    with SqlSandbox(workers=2, limits=Limits(seconds=0.3)) as sandbox:
        queries = [f"SELECT {i}" if i != 5 else bomb for i in range(40)]
        found = sandbox.execute_many([("", sql) for sql in queries])
        assert [e.rows for e in found] == [None if i == 5 else [(i,)] for i in range(40)]
        assert not found[5].ok
        process = next(worker.process for worker in sandbox._workers if worker.process)
        process.kill()
        process.wait()
        before = sandbox.replaced
        again = sandbox.execute_many([("", "SELECT 1")] * 4)
        assert [e.ok for e in again].count(False) == 1 and sandbox.replaced == before + 1


@pytest.mark.parametrize("name", ["attach", "counting without end", "large blob", "null character", "temporary table"])
def test_a_hostile_context_is_no_better(sandbox, name):
    assert not sandbox.execute(HOSTILE[name][0], "SELECT 1").ok
    assert sandbox.execute(CONTEXT, "SELECT count(*) FROM t").rows == [(2,)]


@pytest.fixture
def one():
    """A sandbox for violent tests, and its only worker."""
    with SqlSandbox(workers=1, limits=Limits(seconds=0.3, bytes=1000)) as sandbox:
        yield sandbox, sandbox._workers[0]


@pytest.mark.parametrize(
    "reply",
    [
        b" " * 30_000 + b'{"rows": []}\n',
        b"nope\n",
        b"\xff\n",
        b"[" * 15_000 + b"\n",
        b"[]\n",
        b"{}\n",
        b'{"error": 1}\n',
        b'{"rows": [1]}\n',
        b'{"rows": [[{}]]}\n',
        b'{"rows": [[[1]]]}\n',
        b'{"rows": [[{"blob": "zz"}]]}\n',
        b'{"rows": [[1]]}',
    ],
)
def test_nonsense_from_a_worker_is_not_believed(one, reply):
    sandbox, worker = one
    process = worker.process
    process.stdout.close()
    process.stdout = io.BytesIO(reply)
    assert not sandbox.execute("", "SELECT 1").ok
    assert sandbox.replaced == 1 and process.returncode is not None
    assert sandbox.execute("", "SELECT 2").rows == [(2,)]


def test_a_worker_that_hangs_is_killed(one):
    sandbox, worker = one
    process = worker.process
    os.kill(process.pid, signal.SIGSTOP)
    assert sandbox.execute("", "SELECT 1").error == "took longer than 0.3 s"
    assert sandbox.replaced == 1 and process.returncode == -signal.SIGKILL
    assert sandbox.execute("", "SELECT 2").rows == [(2,)]


def test_an_interrupted_query_is_not_answered_to_the_next(one):
    sandbox, worker = one

    class Interrupted(io.BytesIO):
        def readline(self, most):
            raise KeyboardInterrupt

    worker.process.stdout.close()
    worker.process.stdout = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        sandbox.execute("", "SELECT 1")
    assert sandbox.execute("", "SELECT 2").rows == [(2,)]


def test_a_worker_that_cannot_be_replaced_now_may_be_later(one, monkeypatch):
    sandbox, worker = one
    worker.stop()
    with monkeypatch.context() as patch, pytest.raises(MolfError, match="does not start"):
        patch.setattr(sys, "executable", "/bin/false")
        sandbox.execute("", "SELECT 1")
    assert sandbox.execute("", "SELECT 2").rows == [(2,)]


def test_a_worker_ends_when_its_parent_is_gone():
    code = (
        "import os, signal\nfrom molf.tasks.sql_sandbox import SqlSandbox\nwith SqlSandbox(workers=1) as sandbox:\n"
        "    print(sandbox._workers[0].process.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for _ in range(500):
        state = subprocess.run(["ps", "-o", "stat=", "-p", done.stdout.strip()], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):  # whoever adopted it may not have buried it yet
            return
        time.sleep(0.02)
    pytest.fail("the worker still runs after ten seconds")


def test_no_process_and_no_folder_is_left():
    with SqlSandbox(workers=2) as sandbox:
        folder = sandbox._workers[0].folder
        processes = [worker.process for worker in sandbox._workers]
    assert all(process.poll() is not None for process in processes)
    assert not os.path.exists(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="the system's limits are those of Linux")
def test_the_system_lets_a_worker_open_nothing():
    code = (
        "from molf.tasks.sql_worker import limit_process\nimport socket\nlimit_process(2**29)\n"
        "for act in (lambda: open('/etc/passwd'), lambda: open('new.txt', 'w'), lambda: socket.socket(), "
        "lambda: bytearray(2**30)):\n"
        "    try:\n        act()\n    except (OSError, MemoryError) as error:\n        print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "OSError", "OSError", "MemoryError"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.text(max_size=60), sql=st.text(max_size=200))
def test_any_text_ends_in_an_answer(sandbox, context, sql):
    found = sandbox.execute(context, sql)
    assert (found.rows is None) != found.ok and (found.error is None) == found.ok


FRAGMENTS = [
    *"()*,;.'\"=<>-+/|%", "SELECT", "FROM", "WHERE", "t", "a", "b", "GROUP BY", "ORDER BY", "UNION ALL", "WITH RECURSIVE c AS (",
    "JOIN t AS u ON", "count(*)", "1", "NULL", "'x'", "x'ff'", "LIMIT", "CREATE TABLE v (", "INSERT INTO t", "DELETE FROM t",
    "PRAGMA", "ATTACH", "VACUUM", "randomblob(99999999)", "OVER (", "\0", "--", "/*",
]  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sql=st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(" ".join))
def test_any_words_of_sql_end_in_an_answer(sandbox, sql):
    found = sandbox.execute(CONTEXT, sql)
    assert (found.rows is None) != found.ok and (found.error is None) == found.ok


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MolfError, match="does not start.*/bin/false"), SqlSandbox(workers=1):
        pass

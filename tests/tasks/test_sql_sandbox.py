import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molf.errors import MolfError
from molf.tasks import sql_worker
from molf.tasks.sql_filter import filter_program
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
    "lone surrogate": ("SELECT '\ud800'", "surrogates not allowed"),
    "megabytes": (f"SELECT '{'x' * 3_000_000}'", "more than 200000 characters"),
    "trigger without end": (
        "CREATE TRIGGER g AFTER INSERT ON t BEGIN INSERT INTO t VALUES (1, 'z'); END; PRAGMA recursive_triggers = ON",
        "not authorized",
    ),
    "nothing": (" ;; -- only a comment\n /* and another */", "no statement"),
    "prose": ("I cannot help with that.", "syntax error"),
}  # fmt: skip


IN_CONTEXT = ["attach", "counting without end", "large blob", "null character", "temporary table"]
SANDBOX = SqlSandbox(workers=1, limits=Limits(seconds=SECONDS, rows=1000, bytes=2**20))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_statements_end_as_not_ok(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.TemporaryDirectory", lambda prefix: nullcontext(str(tmp_path)))
    sql, reason = HOSTILE[name]
    began = time.monotonic()
    queries = [
        (CONTEXT, sql),
        (CONTEXT, "SELECT count(*) FROM t"),
        *([(sql, "SELECT 1")] if name in IN_CONTEXT else []),
    ]
    found, after, *in_context = SANDBOX.execute_many(queries)
    assert not found.ok and found.rows is None
    assert re.search(reason, found.error), found.error
    assert after.rows == [(2,)]  # the next query is none the worse
    assert not any(e.ok for e in in_context)
    assert time.monotonic() - began < 2 * SECONDS + 10  # the limits, the grace, and a new worker on a busy machine
    assert not list(tmp_path.iterdir())


QUERIES = {
    "SELECT * FROM t ORDER BY a DESC": [(2, "y"), (1, "x")],
    "SELECT 1.5, NULL, x'00ff', 'é'": [(1.5, None, b"\x00\xff", "é")],
    "SELECT 1; SELECT 2;": [(2,)],
    "SELECT a FROM t WHERE b = 'a;b'": [],
    "SELECT CAST(x'ff' AS TEXT)": [("\udcff",)],
    "SELECT 9e999": [(float("inf"),)],
    "SELECT value FROM json_each('[1, 2]')": [(1,), (2,)],
    "DELETE FROM t WHERE a = 1": [("t",), ("t", 2, "y")],
    "CREATE TABLE u AS SELECT b FROM t; DROP TABLE t": [("u",), ("u", "x"), ("u", "y")],
    "SELECT count(*) FROM t": [(2,)],  # every query has a database of its own
}


def test_queries_give_their_rows():
    found = SANDBOX.execute_many((CONTEXT, sql) for sql in QUERIES)
    assert [(e.ok, e.rows, e.error) for e in found] == [(True, rows, None) for rows in QUERIES.values()]


def test_a_fault_in_the_context_is_told_from_one_in_the_query():
    context, query = SANDBOX.execute_many([("CREATE TABLE", "SELECT 1"), ("", "SELECT * FROM t")])
    assert context.error.startswith("context: ") and query.error == "no such table: t"


def test_many_queries_keep_their_order():
    queries = [HOSTILE["long text by format"][0] if i == 5 else f"SELECT {i}" for i in range(40)]
    found = SqlSandbox(limits=Limits(seconds=0.3)).execute_many(("", sql) for sql in queries)
    assert [e.rows for e in found] == [None if i == 5 else [(i,)] for i in range(40)]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Replace the worker by one that does something else with queries of the number 1, and answers others with no rows."""

    def replace(act):
        script = f"import os, signal, sys\nprint({{}}, flush=True)\nfor line in sys.stdin:\n    if ' 1' in line:\n        {act}\n"
        (tmp_path / "worker.py").write_text(script + "    print('{\"rows\": []}', flush=True)\n")
        monkeypatch.setattr(sql_worker, "__file__", str(tmp_path / "worker.py"))
        return SqlSandbox(1, Limits(seconds=0.3, bytes=1000)).execute_many([("", f"SELECT {i}") for i in range(3)])

    return replace


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
def test_nonsense_from_a_worker_is_not_believed(broken, reply):
    before, nonsense, after = broken(f"sys.stdout.buffer.write({reply!r}); sys.stdout.buffer.flush()")
    assert before.ok and after.ok and nonsense.error == "answered with nonsense"


@pytest.mark.parametrize(
    ("act", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", "took longer than 0.3 s"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended its worker (status -9)"),
        ("sys.exit(3)", "ended its worker (status 3)"),
    ],
)
def test_a_worker_that_hangs_or_dies_is_replaced(broken, act, error):
    before, failed, after = broken(act)
    assert before.ok and after.ok and failed.error == error


def test_a_worker_ends_when_its_parent_is_gone():
    code = (
        "import os, signal, subprocess\nfrom molf.tasks.sql_sandbox import SqlSandbox\n"
        "process = SqlSandbox()._start()\n"
        "print(process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for _ in range(500):
        state = subprocess.run(["ps", "-o", "stat=", "-p", done.stdout.strip()], capture_output=True, text=True).stdout
        if not state.strip() or state.startswith("Z"):  # whoever adopted it may not have buried it yet
            return
        time.sleep(0.02)
    pytest.fail("the worker still runs after ten seconds")


def test_no_process_is_left(monkeypatch):
    SANDBOX.execute("", "")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
    )
    SqlSandbox(2, Limits(seconds=0.3)).execute_many([("", "SELECT 1"), ("", HOSTILE["counting without end"][0])])
    assert len(started) == 2 and all(process.poll() is not None for process in started)


ESCAPES = {  # what code that runs inside a worker might try, after closing a descriptor
    "read a file": "open('/etc/passwd')",
    "write a file": "open('new.txt', 'w')",
    "open a socket": "socket.socket()",
    "fork": "os.fork()",
    "memory": "bytearray(2**30)",
    "raise a limit": "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
    "become root": "os.setuid(0)",
}
MORE_ESCAPES = {  # only the filter refuses these, to a process of the same user
    "delete a file": "os.unlink(FILE)",
    "empty a file": "os.truncate(FILE, 0)",
    "rename a file": "os.rename(FILE, FILE + 'x')",
    "look at a file": "os.stat(FILE)",
    "make a folder": "os.mkdir(FILE + 'y')",
    "another program": "os.execve('/bin/true', ['true'], {})",
    "signal its parent": "os.kill(os.getppid(), 0)",
    "executable memory": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "limits of another": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)",
}


def refused(attempts, file, program=""):
    """Return the attempts that the system refuses to a process that is confined as a worker is, and its error numbers."""
    lines = [
        "import json, mmap, os, resource, socket",
        "from molf.tasks.sql_worker import filter_calls, limit_process",
        f"limit_process(2**29); filter_calls(bytes.fromhex('{program}')); os.close(2); FILE = {str(file)!r}",
        "found = {}",
        f"for name, attempt in {attempts!r}.items():",
        "    try: eval(attempt)",
        "    except (OSError, ValueError, MemoryError) as error: found[name] = getattr(error, 'errno', None)",
        "print(json.dumps(found))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the system's limits are those of Linux")
def test_limits_hold_whatever_runs_inside_a_worker(tmp_path):
    assert refused(ESCAPES, tmp_path / "file").keys() == ESCAPES.keys()


@pytest.mark.skipif(not filter_program(), reason="needs Linux, pyseccomp and libseccomp")
def test_the_filter_refuses_what_limits_allow(tmp_path):
    (tmp_path / "file").write_text("kept")
    assert refused(ESCAPES, tmp_path / "file", filter_program().hex()).keys() == ESCAPES.keys()
    found = refused(MORE_ESCAPES, tmp_path / "file", filter_program().hex())
    assert found == dict.fromkeys(MORE_ESCAPES, errno.EPERM)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_have_no_rights():
    worker = SANDBOX._start()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines())
    with worker:
        worker.kill()
    assert int(status["CapEff"], 16) == 0 and "0" not in status["Uid"].split()
    assert int(status["NoNewPrivs"]) == 1
    if filter_program():
        assert int(status["Seccomp"]) == 2


FRAGMENTS = [
    *"()*,;.'\"=<>-+/|%", "SELECT", "FROM", "WHERE", "t", "a", "b", "GROUP BY", "ORDER BY", "UNION ALL", "WITH RECURSIVE c AS (",
    "JOIN t AS u ON", "count(*)", "1", "NULL", "'x'", "x'ff'", "LIMIT", "CREATE TABLE v (", "INSERT INTO t", "DELETE FROM t",
    "PRAGMA", "ATTACH", "VACUUM", "randomblob(99999999)", "OVER (", "\0", "--", "/*",
]  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(
    texts=st.lists(st.tuples(st.text(max_size=60), st.text(max_size=200)), max_size=20),
    words=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(" ".join), min_size=15, max_size=30),
)
def test_any_text_and_any_words_of_sql_end_in_an_answer(texts, words):
    for found in SANDBOX.execute_many([*texts, *((CONTEXT, sql) for sql in words)]):
        assert (found.rows is None) != found.ok and (found.error is None) == found.ok


@pytest.mark.parametrize(
    ("target", "value", "match"),
    [
        ("sys.executable", "/bin/false", "does not start.*/bin/false"),
        ("sys.executable", "/no/python", "does not start.*/no/python"),
        ("tempfile.tempdir", "/no/folder", "does not start.*/no/folder"),
    ],
)
def test_a_worker_that_cannot_start_is_an_error(monkeypatch, target, value, match):
    monkeypatch.setattr(target, value)
    with pytest.raises(MolfError, match=match):
        SANDBOX.execute("", "SELECT 1")


def test_a_deleted_temporary_folder_fails_no_query(monkeypatch):
    SANDBOX.execute("", "")  # looks for libseccomp with a process of its own
    popen = subprocess.Popen

    def start(*args, cwd, **kwargs):
        process = popen(*args, cwd=cwd, **kwargs)
        shutil.rmtree(cwd)
        return process

    monkeypatch.setattr(subprocess, "Popen", start)
    queries = ["SELECT 1", HOSTILE["long text by format"][0], "SELECT 2"]
    found = SqlSandbox(1, Limits(seconds=0.3)).execute_many(("", sql) for sql in queries)
    assert [e.rows for e in found] == [[(1,)], None, [(2,)]]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own():
    wanted = [[(i,)] for i in range(300)]

    def right(_=None):
        return [e.rows for e in SANDBOX.execute_many(("", f"SELECT {i}") for i in range(300))] == wanted

    with ThreadPoolExecutor() as pool:
        answers = pool.submit(right)
        time.sleep(0.1)  # its worker answers
        child = os.fork()
        if not child:
            os._exit(0 if right() else 1)
        assert right() and answers.result() and os.waitpid(child, 0)[1] == 0

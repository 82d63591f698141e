import time

import pytest

from molf.tasks.sql_worker import TooMuch, answer, statements

LIMITS = {"seconds": 5.0, "memory": 2**29, "rows": 3, "bytes": 100, "length": 1000}


def test_statements_are_cut_where_sqlite_says_they_end():
    script = "SELECT ';' ; -- a; b\n CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END; /* ; */ SELECT 2"
    assert [" ".join(s.split()) for s in statements(script)] == [
        "SELECT ';' ;",
        "-- a; b CREATE TRIGGER g AFTER INSERT ON t BEGIN SELECT 1; END;",
        "/* ; */ SELECT 2",
    ]


@pytest.mark.parametrize(
    "script", ["", " ;;\n", "-- only this", "/* or\nthis */ ;", "/* without end", "/**/ -- \n" * 99]
)
def test_white_space_and_comments_are_no_statements(script):
    assert list(statements(script)) == []
    assert answer({"context": "", "sql": script}, LIMITS) == {"error": "no statement"}


@pytest.mark.parametrize("comment", ["/**/", "/* */ ", "-- --\n", "--;\n"])
def test_many_comments_take_no_time(comment):
    began = time.monotonic()
    assert len(list(statements(comment * 500 + "SELECT 1"))) == 1
    assert time.monotonic() - began < 1


def test_too_many_statements_are_refused():
    with pytest.raises(TooMuch, match="more than 50 statements"):
        list(statements("SELECT 1;" * 51))


@pytest.mark.parametrize(
    ("sql", "error"),
    [
        ("SELECT 1 UNION SELECT 2 UNION SELECT 3 UNION SELECT 4", "more than 3 rows"),
        ("SELECT hex(randomblob(60))", "a result of more than 100 bytes"),
        ("CREATE TABLE a (x); CREATE TABLE b (x); CREATE TABLE c AS SELECT 1 AS x", "more than 3 rows"),
        (f"SELECT '{'é' * 50}'", "a result of more than 100 bytes"),
        (f"CREATE TABLE {'name' * 10} AS SELECT 1 AS x", "a result of more than 100 bytes"),
        (f"CREATE TABLE {'a' * 50} (x); CREATE TABLE {'b' * 50} (x)", "a result of more than 100 bytes"),
    ],
)  # fmt: skip
def test_results_are_bounded(sql, error):
    assert answer({"context": "", "sql": sql}, LIMITS) == {"error": error}

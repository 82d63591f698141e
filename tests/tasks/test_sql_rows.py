import sqlite3
import time

import pytest

from molf.tasks.sql_rows import filled_context, has_rows

PETS = "CREATE TABLE pets (name VARCHAR, kind VARCHAR, age INTEGER, born DATE);"
JOINED = "CREATE TABLE owners (id INT, city TEXT); CREATE TABLE pets (name TEXT, owner_id INT);"


def result(context, query):
    database = sqlite3.connect(":memory:")
    database.executescript(context)
    rows = database.execute(query).fetchall()
    database.close()
    return rows


@pytest.mark.parametrize(
    "context, found",
    [
        (PETS, False),
        (PETS + " insert or ignore into pets values (1, 2, 3, 4);", True),
        ("CREATE TABLE a AS SELECT 1", True),
        ("CREATE TABLE a (b INT); CREATE VIEW v AS SELECT * FROM a;", False),
        ("CREATE TABLE insertions (into_x INT)", False),
    ],
)
def test_whether_a_context_has_rows(context, found):
    assert has_rows(context) is found


@pytest.mark.parametrize("words", ["INSERT ", "REPLACE;", "CREATE TABLE ", "CREATE", "CREATE TABLE t("])
def test_long_contexts_take_no_time(words):
    began = time.monotonic()
    assert not has_rows(words * 20_000)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("context", [PETS + " INSERT INTO pets VALUES (1, 2, 3, 4);", "CREATE TABLE (", ""])
def test_other_contexts_stay(context):
    assert filled_context(context, "SELECT 1") == context


def test_rows_are_always_the_same():
    query = "SELECT name FROM pets WHERE age > 3"
    assert filled_context(PETS, query) == filled_context(PETS, query)
    assert filled_context(PETS, query).startswith(PETS + '\nINSERT OR IGNORE INTO "pets" ("name", ')


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("SELECT name FROM pets WHERE age > 3", "SELECT name FROM pets WHERE age >= 3"),
        ("SELECT name FROM pets WHERE age > 3", "SELECT name FROM pets WHERE age > 4"),
        ("SELECT name FROM pets WHERE age > 3", "SELECT kind FROM pets WHERE age > 3"),
        ("SELECT name FROM pets WHERE kind = 'cat'", "SELECT name FROM pets WHERE kind = 'Cat'"),
        ("SELECT name FROM pets WHERE kind = 'cat'", "SELECT name FROM pets"),
        ("SELECT name FROM pets WHERE kind = 'cat' AND age = 2", "SELECT name FROM pets WHERE kind = 'cat' OR age = 2"),
        ("SELECT MAX(age) FROM pets WHERE kind = 'cat'", "SELECT MAX(age) FROM pets"),
        ("SELECT MIN(age) FROM pets WHERE kind = 'cat'", "SELECT MIN(age) FROM pets"),
        ("SELECT SUM(age) FROM pets", "SELECT COUNT(age) FROM pets"),
        ("SELECT AVG(age) FROM pets", "SELECT MAX(age) FROM pets"),
        ("SELECT name FROM pets", "SELECT DISTINCT name FROM pets"),
        ("SELECT name FROM pets ORDER BY age LIMIT 1", "SELECT name FROM pets ORDER BY age DESC LIMIT 1"),
        ("SELECT name FROM pets ORDER BY age LIMIT 8", "SELECT name FROM pets ORDER BY age LIMIT 9"),
        ("SELECT name FROM pets WHERE born > '2020-02-29'", "SELECT name FROM pets WHERE born >= '2020-02-29'"),
        ("SELECT name FROM pets WHERE name LIKE '%a%'", "SELECT name FROM pets WHERE name LIKE 'a%'"),
        (
            "SELECT kind FROM pets GROUP BY kind HAVING COUNT(*) > 1",
            "SELECT kind FROM pets GROUP BY kind HAVING COUNT(*) > 0",
        ),
    ],
)
def test_wrong_queries_give_other_results(right, wrong):
    context = filled_context(PETS, right)
    assert result(context, right) not in ([], [(None,)], [(0,)])
    assert result(context, right) != result(context, wrong)


@pytest.mark.parametrize(
    "right, wrong",
    [
        (
            "SELECT name FROM pets JOIN owners ON owner_id = id WHERE city = 'Ulm'",
            "SELECT name FROM pets JOIN owners ON owner_id = id",
        ),
        (
            "SELECT city FROM owners JOIN pets ON owner_id = id GROUP BY id HAVING COUNT(*) >= 3",
            "SELECT city FROM owners JOIN pets ON owner_id = id GROUP BY id HAVING COUNT(*) > 3",
        ),
        (
            "SELECT city FROM owners WHERE id NOT IN (SELECT owner_id FROM pets)",
            "SELECT city FROM owners WHERE id IN (SELECT owner_id FROM pets)",
        ),
        (
            "SELECT city, name FROM owners JOIN pets ON owner_id = id",
            "SELECT city, name FROM owners LEFT JOIN pets ON owner_id = id",
        ),
    ],
)
def test_joins_find_partners(right, wrong):
    context = filled_context(JOINED, right)
    assert result(context, right)
    assert sorted(map(str, result(context, right))) != sorted(map(str, result(context, wrong)))


def test_rows_that_break_a_constraint_are_left_out():
    context = filled_context("CREATE TABLE p (id INT PRIMARY KEY CHECK (id < 60), age)", "SELECT id FROM p")
    assert result(context, "SELECT id FROM p") == [(20,), (50,)]


def test_names_and_texts_are_quoted():
    context = 'CREATE TABLE "order" ("group" TEXT, b TEXT);'
    query = "SELECT b FROM \"order\" WHERE \"group\" = 'it''s'"
    assert result(filled_context(context, query), query)

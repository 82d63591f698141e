import pytest

from molf.tasks.sql_ast import qualified_query
from molf.tasks.sql_conditions import Condition, conditions_of, split_values
from molf.tasks.sql_rows import filled_context

SCHEMA = {"t": {"a": "TEXT", "b": "INT", "d": "DATE"}, "s": {"id": "INT", "b": "INT"}}


def conditions(sql):
    return conditions_of(qualified_query(sql, SCHEMA), SCHEMA)


@pytest.mark.parametrize(
    "where, column, expected",
    [
        ("a = 'x'", "a", [Condition("=", "x")]),
        ('a = "x" OR a = "y"', "a", [Condition("=", "x"), Condition("=", "y")]),
        ("5 < b", "b", [Condition(">", 5)]),
        ("b >= -2.5", "b", [Condition(">=", -2.5)]),
        ("b BETWEEN 1 AND 3", "b", [Condition(">=", 1), Condition("<=", 3)]),
        ("a IN ('x', 'y')", "a", [Condition("=", "x"), Condition("=", "y")]),
        ("NOT a IN ('x')", "a", [Condition("!=", "x")]),
        ("a LIKE '%x%'", "a", [Condition("like", "%x%")]),
        ("a NOT LIKE 'x_'", "a", [Condition("not like", "x_")]),
        ("a IS NOT NULL", "a", [Condition("!=", None)]),
        ("LOWER(a) = 'x'", "a", [Condition("=", "x")]),
        ("STRFTIME('%Y', d) = '2021'", "d", [Condition("like", "2021%")]),
    ],
)
def test_comparisons_are_read(where, column, expected):
    assert conditions(f"SELECT * FROM t WHERE {where}").of == {("t", column): expected}


def test_columns_are_those_of_their_own_query():
    found = conditions("SELECT a FROM t WHERE b = 1 AND a IN (SELECT id FROM s WHERE b > 2)")
    assert found.of == {("t", "b"): [Condition("=", 1)], ("s", "b"): [Condition(">", 2)]}
    assert found.joined == [{("t", "a"), ("s", "id")}]


def test_joined_columns_share_their_conditions():
    found = conditions("SELECT * FROM t AS x JOIN s AS y ON x.b = y.id WHERE y.id = 4 GROUP BY a HAVING COUNT(*) > 7")
    assert found.of == {("t", "b"): [Condition("=", 4)], ("s", "id"): [Condition("=", 4)]}
    assert found.count == 7


def test_what_is_reckoned_with_is_numeric():
    assert conditions("SELECT AVG(a), MAX(d) FROM t LIMIT 3").numeric == {("t", "a")}
    assert conditions("SELECT a * 2 FROM t LIMIT 3").numeric == {("t", "a")}


@pytest.mark.parametrize("as_number", [True, False])
@pytest.mark.parametrize(
    "given",
    [
        [Condition("=", "New York")], [Condition("!=", "x")], [Condition("=", 5)], [Condition("=", "+8")],
        [Condition(">", 9)], [Condition("<", 10)], [Condition(">=", 0.145)], [Condition("<=", "7.9")],
        [Condition(">", 3), Condition("<", 6)], [Condition("like", "%ab%")], [Condition("not like", "ab%")],
        [Condition(">", "2020-02-29")], [Condition("=", None)], [Condition("!=", None)],
    ],
)  # fmt: skip
def test_values_do_and_do_not_satisfy(given, as_number):
    satisfying, missing = split_values(given, as_number=as_number)
    assert satisfying and missing
    assert all(one.holds(value, as_number=as_number) for value in satisfying for one in given)
    assert not any(all(one.holds(value, as_number=as_number) for one in given) for value in missing)


def test_of_conditions_that_exclude_each_other_one_is_satisfied():
    satisfying, missing = split_values([Condition("=", "x"), Condition("=", "y")], as_number=False)
    assert satisfying == ["x", "y"] and "X" in missing


@pytest.mark.parametrize(
    ("pattern", "value", "found"),
    [("[*]_%", "[*]x\n", True), ("[*]_%", "*x", False), ("A?", "ab", False), ("%a" * 40 + "%b", "a" * 99, False)],
)
def test_patterns(pattern, value, found):
    assert Condition("like", pattern).holds(value, as_number=False) is found
    assert Condition("not like", pattern).holds(value, as_number=False) is not found


def test_boundaries_are_among_the_values():
    satisfying, missing = split_values([Condition(">", 25)], as_number=True)
    assert satisfying[0] == 26 and missing[0] == 25
    assert split_values([], as_number=True) == ([], [])


@pytest.mark.parametrize(
    "constant",
    ["'2021-02-30'", "'0000-00-00'", "'9999-12-31'", "9" * 400, f"'{'9' * 400}'", "1e999", "'nan'", "'Infinity'", "5e-324"],
)  # fmt: skip
@pytest.mark.parametrize("operator", ["=", "<", "LIKE"])
def test_constants_beyond_calendar_and_floats_are_filled_like_others(constant, operator):
    context = "CREATE TABLE t (a INT, b TEXT, d DATE);"
    assert "INSERT" in filled_context(
        context, f"SELECT a FROM t WHERE d {operator} {constant} OR b {operator} {constant}"
    )

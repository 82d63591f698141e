import pytest

from molf.tasks.sql_ast import is_ordered, logic_of, parse_query, schema_of, statements

SCHEMA = {"t": {"a": "VARCHAR", "b": "INT"}, "s": {"id": "INT", "c": "INT"}}


def test_the_schema_of_a_context():
    context = (
        'CREATE TABLE Cities ("City Name" VARCHAR(50), pop DECIMAL(5, 2), x); INSERT INTO Cities VALUES (1, 2, 3);'
    )
    assert schema_of(context) == {"cities": {"city name": "TEXT(50)", "pop": "REAL(5, 2)", "x": ""}}
    assert schema_of("CREATE VIEW v AS SELECT 1; CREATE TABLE c AS SELECT 1") == {}
    assert schema_of("CREATE TABLE (") == {}


def test_double_quotes_hold_a_text_unless_there_is_such_a_column():
    query = parse_query('SELECT "A" FROM T WHERE "B" = "Paris" AND t."q" = 1', SCHEMA)
    assert query.sql("sqlite") == "SELECT a FROM t WHERE b = 'Paris' AND t.q = 1"


@pytest.mark.parametrize(
    "one, other",
    [
        ("SELECT a FROM t WHERE b = 1", "select T1.a as z\nfrom t as T1 where 1 = T1.b"),
        ('SELECT a FROM t WHERE a = "x" AND b = 2', "SELECT a FROM t WHERE b = 2 AND a = 'x'"),
        ("SELECT a FROM t ORDER BY b DESC", "SELECT a FROM t x ORDER BY x.b DESC"),
        ("SELECT a FROM t ORDER BY a", "SELECT t.a AS q FROM t ORDER BY q ASC"),
        ("SELECT * FROM t", "SELECT a, b FROM t"),
        ("SELECT COUNT(*) FROM t INNER JOIN s ON t.b = s.id", "SELECT COUNT(*) AS n FROM t q JOIN s r ON r.id = q.b"),
        (
            "SELECT a, COUNT(*) AS n FROM t GROUP BY a HAVING COUNT(*) > 2 ORDER BY n DESC LIMIT 1",
            "SELECT a, COUNT(*) FROM t GROUP BY a HAVING COUNT(*) > 2 ORDER BY COUNT(*) DESC LIMIT 1",
        ),
        ("SELECT q.m FROM (SELECT MAX(a) AS m FROM t) AS q", "SELECT z.k FROM (SELECT MAX(t.a) AS k FROM t) AS z"),
        (
            "WITH w AS (SELECT a AS k FROM t) SELECT k FROM w ORDER BY k",
            "WITH v AS (SELECT a AS j FROM t) SELECT j FROM v ORDER BY v.j",
        ),
        ("SELECT a FROM t UNION SELECT c FROM s ORDER BY a", "SELECT a AS z FROM t UNION SELECT c FROM s ORDER BY z"),
        (
            "SELECT a FROM t WHERE b IN (SELECT id FROM s WHERE c > 1)",
            "SELECT x.a FROM t x WHERE x.b IN (SELECT y.id FROM s y WHERE y.c > 1)",
        ),
        ("DELETE FROM t WHERE b <> 1", "delete from T where b != 1"),
    ],
)
def test_the_same_in_other_words(one, other):
    assert logic_of(one, SCHEMA) == logic_of(other, SCHEMA) is not None


@pytest.mark.parametrize(
    "one, other",
    [
        ("SELECT a FROM t", "SELECT b FROM t"),
        ("SELECT a, b FROM t", "SELECT b, a FROM t"),
        ("SELECT a FROM t WHERE b < 1", "SELECT a FROM t WHERE b <= 1"),
        ("SELECT a FROM t WHERE a = 'x'", "SELECT a FROM t WHERE a = 'X'"),
        ("SELECT a FROM t WHERE a = 1", "SELECT a FROM t WHERE a = '1'"),
        ("SELECT a FROM t WHERE a = 'x' AND b = 1", "SELECT a FROM t WHERE a = 'x' OR b = 1"),
        ("SELECT COUNT(a) FROM t", "SELECT COUNT(DISTINCT a) FROM t"),
        ("SELECT a FROM t ORDER BY b", "SELECT a FROM t ORDER BY b DESC"),
        ("SELECT a FROM t LIMIT 1", "SELECT a FROM t LIMIT 2"),
        ("SELECT c FROM s JOIN t ON b = id", "SELECT c FROM s LEFT JOIN t ON b = id"),
        ("SELECT q.x FROM (SELECT a AS x, b AS y FROM t) q", "SELECT q.y FROM (SELECT a AS x, b AS y FROM t) q"),
    ],
)
def test_something_else(one, other):
    forms = logic_of(one, SCHEMA), logic_of(other, SCHEMA)
    assert None not in forms and forms[0] != forms[1]


@pytest.mark.parametrize(
    "sql",
    ["", ";", "SELECT 1; SELECT 2", "SELECT a FROM t WHERE", "(((", "SELECT " + "(" * 5000, "EXPLAIN SELECT 1",
     "SELECT " + "1," * 20_000 + "1"],
)  # fmt: skip
def test_what_cannot_be_understood_has_no_logic(sql, caplog):
    assert logic_of(sql, SCHEMA) is None
    assert not caplog.records


def test_statements_without_the_empty_ones():
    assert [one.sql() for one in statements("SELECT 1;; SELECT 2;")] == ["SELECT 1", "SELECT 2"]


@pytest.mark.parametrize(
    "sql, ordered",
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM t UNION SELECT c FROM s ORDER BY 1", True),
        ("SELECT a FROM t WHERE b = (SELECT c FROM s ORDER BY c LIMIT 1)", False),
        ("SELECT 'ORDER BY' FROM t", False),
        ("not sql at all", False),
    ],
)
def test_only_the_last_order_counts(sql, ordered):
    assert is_ordered(sql, SCHEMA) is ordered

import time

import pytest
from sacrebleu import corpus_bleu as their_bleu

from molf.tasks.sql_metrics import corpus_bleu, exact_match, extract_sql, logic_match, same_rows


@pytest.mark.parametrize(
    "text, sql",
    [
        (" SELECT a FROM t", "SELECT a FROM t"),
        ("SELECT a\nFROM t;\nSELECT b", "SELECT a\nFROM t"),
        ("SELECT 'x;y' FROM t; more", "SELECT 'x;y' FROM t"),
        ("SELECT \";\" || 'it''s; ' FROM t;", "SELECT \";\" || 'it''s; ' FROM t"),
        ("```sql\nSELECT a FROM t;\n```\nThis works.", "SELECT a FROM t"),
        ("Here you are:\n```\nselect a from t\n```", "select a from t"),
        ("```SQL SELECT a FROM t", "SELECT a FROM t"),
        ("The query with the answer is:\nSELECT a FROM t", "SELECT a FROM t"),
        ("Sure, SELECT a FROM t", "SELECT a FROM t"),
        ("SELECT a FROM t\n\nThis selects a.", "SELECT a FROM t"),
        ("WITH w AS (SELECT 1)\n\nSELECT * FROM w", "WITH w AS (SELECT 1)\n\nSELECT * FROM w"),
        ("(SELECT 1) UNION SELECT 2", "(SELECT 1) UNION SELECT 2"),
        ("SELECT a\n \n\n  \nThis selects a.\n\nAnd more.", "SELECT a"),
        ("no idea", "no idea"),
        ("SELECT 'open; FROM t", "SELECT 'open"),
        ("", ""),
    ],
)
def test_the_query_in_what_a_model_wrote(text, sql):
    assert extract_sql(text) == sql


@pytest.mark.parametrize("piece", ["\n", " \n", "\n ", "'\"", "```", "(", "a.", "\t"])
def test_long_texts_take_no_time(piece):
    began = time.monotonic()
    exact_match(extract_sql("SELECT 1" + piece * 60_000 + "x"), "SELECT 1")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("SELECT a FROM t;", "select  A\nfrom T ; ", True),
        ("SELECT COUNT(*) FROM t WHERE a>=1", "SELECT count( * ) FROM t WHERE a >= 1", True),
        ("SELECT a FROM t WHERE b = 'New York'", "SELECT a FROM t WHERE b = 'new york'", False),
        ('SELECT a FROM t WHERE b = "x  y"', 'SELECT a FROM t WHERE b = "x y"', False),
        ("SELECT a FROM t WHERE b = 'it''s'", "SELECT a FROM t where b = 'it''s'", True),
        ("SELECT a FROM t WHERE b > = 1", "SELECT a FROM t WHERE b >= 1", False),
        ("SELECT ab FROM t", "SELECT a b FROM t", False),
        ("SELECT a FROM t", "SELECT a AS b FROM t", False),
    ],
)
def test_exact_match(one, other, same):
    assert exact_match(one, other) is exact_match(other, one) is same


def test_logic_match_of_what_cannot_be_parsed_is_that_of_the_text():
    assert logic_match("SELECT  YEAR(", "select year(", {})
    assert not logic_match("SELECT YEAR(", "SELECT MONTH(", {})
    assert logic_match("SELECT x.a FROM t x", "SELECT a FROM t", {"t": {"a": "INT"}})
    assert not logic_match("SELECT x.a FROM t x", "SELECT b FROM t", {"t": {"a": "INT"}})


ABC = [("a", 1), ("b", 2), ("c", 3)]


@pytest.mark.parametrize(
    "found, wanted, ordered, same",
    [
        (ABC, ABC[::-1], False, True),
        (ABC, ABC[::-1], True, False),
        (ABC, ABC, True, True),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False, False),  # the same set, other multisets
        ([(1,), (1,)], [(1,)], False, False),
        ([(0.1 + 0.2,)], [(0.3,)], True, True),
        ([(1.0,)], [(1,)], True, True),
        ([(1.001,)], [(1,)], True, False),
        ([(2**60,)], [(2**60 + 1,)], True, False),  # integers are exact
        ([(1e-12,)], [(0.0,)], True, True),
        ([("1",)], [(1,)], True, False),
        ([(None,)], [(None,)], True, True),
        ([(None,)], [(0,)], True, False),
        ([(None, 1), (None, 2)], [(None, 2), (None, 1)], False, True),
        ([(None,), (1,), ("x",), (b"x",)], [(b"x",), ("x",), (None,), (1,)], False, True),
        ([(b"x",)], [("x",)], False, False),
        ([(1, 2)], [(2, 1)], False, False),
        ([(1, 2)], [(1,)], False, False),
        ([("b", 0.3), ("a", 0.1 + 0.2)], [("b", 0.1 + 0.2), ("a", 0.3)], False, True),  # near-equal sums swap no rows
        ([], [], True, True),
        ([], [()], False, False),
    ],
)
def test_results(found, wanted, ordered, same):
    assert same_rows(found, wanted, ordered=ordered) is same_rows(wanted, found, ordered=ordered) is same


def test_bleu_is_sacrebleus():
    written = ["SELECT a FROM t WHERE b = 1", "", "SELECT MAX(a) FROM t", "the cat", "SELECT a,\n b FROM t;"]
    right = [
        "SELECT a FROM t WHERE b = 2",
        "SELECT 1",
        "SELECT MIN(a) FROM t WHERE c > 2",
        "SELECT 2",
        "SELECT a, b FROM t",
    ]
    metric = corpus_bleu(written, right)
    lines = [*written[:-1], right[-1]]
    assert metric.value == pytest.approx(their_bleu(lines, [right]).score, abs=1e-9)
    assert metric.low < metric.value < metric.high and metric.n == 5
    assert corpus_bleu(right, right).value == pytest.approx(100)
    assert corpus_bleu(["", "x"], right[:2]).value == 0

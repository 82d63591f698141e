"""Makes up rows for empty tables, so that a wrong query has another result than the correct one.

On empty tables, nearly every query has the correct result. The rows follow from the declared columns and from what the correct
query compares its columns with; nothing is random. Every table gets

- rows that satisfy all comparisons of the query, with different values elsewhere, some of them twice;
- for every compared column, rows in which it alone narrowly fails (the next number, another case);
- for every compared column, a row in which it alone satisfies its comparison; and rows that satisfy none.

Columns that are compared with each other share a few values of unequal frequency, so that joins find partners.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from molf.tasks.sql_ast import qualified_query, schema_of
from molf.tasks.sql_conditions import Column, Conditions, Value, conditions_of, split_values

WITNESSES = 5  # rows that satisfy all comparisons; more if the query counts or limits them
_MOST_WITNESSES = 30
_KEYS = 5
_NEAR_MISSES = 3  # per column

# Values of the rows that satisfy all comparisons, for columns without one; columns take turns. The extremes are in the first
# three rows, which satisfy narrowly, and in different ones; one value occurs twice.
_LOW, _HIGH, _TWICE, _OTHER = 20, 90, 50, 71
_PATTERNS = (
    (_LOW, _HIGH, _TWICE, _TWICE, _OTHER),
    (_TWICE, _LOW, _HIGH, _OTHER, _TWICE),
    (_HIGH, _OTHER, _LOW, _TWICE, _TWICE),
)
# Words in this order, with none of the characters between, give a table rows. Searched one after the other: one pattern for
# both takes quadratic time.
_ROW_GIVERS = [
    (";", re.compile(r"\b(?:INSERT|REPLACE)\b", re.IGNORECASE), re.compile(r"\bINTO\b", re.IGNORECASE)),
    ("[;(]", re.compile(r"\bCREATE\s+TABLE\b", re.IGNORECASE), re.compile(r"\bAS\b", re.IGNORECASE)),
]
_TEXT_TYPES = ("CHAR", "CLOB", "TEXT")


def has_rows(context: str) -> bool:
    """Return whether a context inserts rows into its tables."""
    return any(
        (found := first.search(part)) and then.search(part, found.end())
        for between, first, then in _ROW_GIVERS
        for part in re.split(between, context)
    )


def filled_context(context: str, query: str) -> str:
    """Return a context with rows in its tables; unchanged if it has rows or cannot be parsed."""
    schema = schema_of(context)
    if has_rows(context) or not schema:
        return context
    parsed = qualified_query(query, schema)
    conditions = Conditions() if parsed is None else conditions_of(parsed, schema)
    statements = [context.strip().rstrip(";") + ";"]
    for number, (table, columns) in enumerate(schema.items()):
        cells = [
            _column(declared, conditions, (table, name), 1000 * number + 200 * place)
            for place, (name, declared) in enumerate(columns.items())
        ]
        values = ", ".join(
            f"({', '.join(map(_literal, row))})" for row in _rows(cells, conditions.count, _KEYS + 1 + number)
        )
        # OR IGNORE leaves out rows that violate a constraint of the table.
        names = ", ".join(f'"{name}"' for name in columns)
        statements.append(f'INSERT OR IGNORE INTO "{table}" ({names}) VALUES {values};')
    return "\n".join(statements)


@dataclass(frozen=True)
class _Cells:
    """The values of a column."""

    satisfying: list[Value]  # satisfy the query's conditions on it; empty without conditions
    missing: list[Value]  # narrowly do not
    key: bool  # whether it is compared with other columns
    spell: Callable[[int], Value]  # turns a number into a value of its type that no other column has, keys excepted


def _column(declared: str, conditions: Conditions, column: Column, base: int) -> _Cells:
    own = conditions.of.get(column, [])
    stores_text = any(name in declared.upper() for name in _TEXT_TYPES)
    satisfying, missing = split_values(own, as_number=not stores_text)
    key = any(column in group for group in conditions.joined)
    numeric = column in conditions.numeric or not (stores_text or "DATE" in declared.upper() or not declared)

    def spell(number: int) -> Value:
        if numeric or key:
            return number + (0 if key else base)
        if "DATE" in declared.upper() or "TIME" in declared.upper():
            return (date(2015, 1, 1) + timedelta(days=7 * number + base)).isoformat()
        return f"{column[1]} {number:03d}"

    return _Cells(satisfying, missing, key, spell)


def _rows(columns: Sequence[_Cells], count: int, own_key: int) -> Iterator[list[Value]]:
    """Yield a table's rows; the query compares counts with up to ``count``, and no other table has ``own_key``."""
    compared = [place for place, cells in enumerate(columns) if cells.satisfying and cells.missing]
    for number in range(min(_MOST_WITNESSES, max(WITNESSES, count + 2))):
        yield [_witness(cells, number, place) for place, cells in enumerate(columns)]
    misses = [{place: value} for place in compared for value in columns[place].missing[:_NEAR_MISSES]]
    first = {place: columns[place].missing[0] for place in compared}
    alone = [{other: first[other] for other in compared if other != place} for place in compared]
    # Twice: with larger and with smaller values elsewhere than in the rows that satisfy all, for MAX and MIN.
    changes = [change for change in (*misses, *alone, first) if change for _ in range(2)]
    for number, change in enumerate(changes):
        yield [change.get(place, _outsider(cells, number)) for place, cells in enumerate(columns)]
    if any(cells.key for cells in columns):
        # A row without partners in other tables; and, in one table, keys more, as and less frequent than the query's count.
        repeated = [1] * max(2, count) + [2] * max(1, count - 1) + [3] * max(0, count - 2)
        for number, key in enumerate([own_key, *(repeated if own_key == _KEYS + 1 else [])]):
            yield [
                cells.spell(key) if cells.key else _witness(cells, number, place) for place, cells in enumerate(columns)
            ]


def _witness(cells: _Cells, number: int, place: int) -> Value:
    """Return a column's value in a row that satisfies all conditions."""
    if cells.satisfying:
        return cells.satisfying[max(0, number - 2) % len(cells.satisfying)]
    if cells.key:
        return cells.spell(number % _KEYS + 1)
    again, number = divmod(number, WITNESSES)
    return cells.spell(_PATTERNS[place % len(_PATTERNS)][number] - again)


def _outsider(cells: _Cells, number: int) -> Value:
    """Return a column's value in a row in which another column does not satisfy its conditions."""
    if cells.satisfying:
        return cells.satisfying[number % len(cells.satisfying)]
    if cells.key:
        return cells.spell(number % _KEYS + 1)
    return cells.spell(_HIGH + 5 + number if number % 2 else _LOW - 5 - number)


def _literal(value: Value) -> str:
    """Return a value as SQL."""
    if value is None:
        return "NULL"
    return str(value) if isinstance(value, int | float) else "'" + value.replace("'", "''") + "'"

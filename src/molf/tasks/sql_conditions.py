"""What a query compares its columns with, and values that do and do not satisfy it."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from sqlglot import exp

from molf.tasks.sql_ast import Schema

Value: TypeAlias = str | int | float | None
Column: TypeAlias = tuple[str, str]
"""A table and one of its columns, in lower case."""

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_OPERATORS: dict[type[exp.Expr], str] = {
    exp.EQ: "=", exp.Is: "=", exp.NEQ: "!=", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">=",
}  # fmt: skip
_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_NEGATED = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_ISO_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}$")
_LARGEST = 2**50  # beyond it, a float cannot tell neighbouring numbers apart


@dataclass(frozen=True)
class Condition:
    """A column's comparison with a constant; ``=`` and ``!=`` with None stand for IS NULL and IS NOT NULL."""

    operator: str  # =, !=, <, <=, >, >=, like or not like
    constant: Value

    def holds(self, value: Value, *, as_number: bool) -> bool:
        """Return whether a value satisfies the condition, comparing as strings or as numbers, which precede strings."""
        if self.constant is None:
            return self.operator == ("=" if value is None else "!=")
        if value is None:
            return False
        if self.operator.endswith("like"):
            # fnmatch takes no exponential time over many wildcards.
            spelt = {"%": "*", "_": "?", "*": "[*]", "?": "[?]", "[": "[[]"}
            pattern = "".join(spelt.get(letter, letter) for letter in str(self.constant).lower())
            return fnmatchcase(str(value).lower(), pattern) == (self.operator == "like")
        return _COMPARE[self.operator](_comparable(value, as_number), _comparable(self.constant, as_number))


def _comparable(value: str | int | float, as_number: bool) -> tuple[int, float, str]:
    number = _number(value) if as_number else None
    return (1, 0.0, str(value)) if number is None else (0, float(number), "")


def _number(value: str | int | float) -> int | float | None:
    """Return a value as a number; None if it is none or too large."""
    for kind in (int, float):
        try:
            number = kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
        return number if abs(number) < _LARGEST else None
    return None


def _date(text: str) -> date | None:
    """Return the day that an ISO date names; None if there is none, or no years around it."""
    try:
        day = date.fromisoformat(text) if _ISO_DATE.match(text) else None
    except ValueError:  # 30 February
        return None
    return day if day and 10 < day.year < 9990 else None


@dataclass(frozen=True)
class Conditions:
    """What a query asks of the tables."""

    of: dict[Column, list[Condition]] = field(default_factory=dict)
    joined: list[set[Column]] = field(default_factory=list)  # groups of columns that are compared with each other
    numeric: set[Column] = field(default_factory=set)  # used in arithmetic
    count: int = 0  # the largest number of rows that the query compares a count with or limits to


def conditions_of(query: exp.Expr, schema: Schema) -> Conditions:
    """Return the comparisons anywhere in a query, including subqueries."""
    found = Conditions(count=max([0, *_counts(query)]))
    tables = _Tables(query, schema)
    for node in query.walk():
        if isinstance(node, exp.Sum | exp.Avg | exp.Binary) and not isinstance(node, exp.Predicate | exp.Connector):
            found.numeric.update(tables.columns(node.find_all(exp.Column)))
        for column, condition in _comparisons(node, tables):
            own = found.of.setdefault(column, [])
            if condition not in own:
                own.append(condition)
        _join(found.joined, tables.columns(_compared_columns(node)))
    for group in found.joined:
        shared = [condition for column in sorted(group) for condition in found.of.get(column, [])]
        if shared:
            found.of.update({column: shared for column in group})
    return found


class _Tables:
    """Finds the table of a query's columns."""

    def __init__(self, query: exp.Expr, schema: Schema) -> None:
        self._schema = schema
        self._names = {table.alias_or_name: table.name for table in query.find_all(exp.Table) if table.name in schema}

    def columns(self, given: Iterable[exp.Column]) -> set[Column]:
        return {found for column in given if (found := self.column(column)) is not None}

    def column(self, column: exp.Column) -> Column | None:
        names = [self._names.get(column.table)] if column.table else list(self._names.values())
        return next(((name, column.name) for name in names if name and column.name in self._schema[name]), None)


def _counts(query: exp.Expr) -> Iterator[int]:
    for node in query.find_all(exp.Limit, exp.Offset, exp.Binary):
        if isinstance(node, exp.Binary) and not isinstance(node.left, exp.Count):
            continue
        if isinstance(node.expression, exp.Literal) and isinstance(count := _number(node.expression.name), int):
            yield count


def _comparisons(node: exp.Expr, tables: _Tables) -> Iterator[tuple[Column, Condition]]:
    """Yield the conditions in one node of a query."""
    if isinstance(node, exp.Like):
        raw = [(node.this, "like", node.expression)]
    elif isinstance(node, exp.In):
        raw = [(node.this, "=", option) for option in node.expressions]
    elif isinstance(node, exp.Between):
        raw = [(node.this, ">=", node.args["low"]), (node.this, "<=", node.args["high"])]
    elif type(node) in _OPERATORS:
        raw = [(node.this, _OPERATORS[type(node)], node.expression)]
    else:
        return
    for left, compared, right in raw:
        if isinstance(left, exp.Literal):
            left, compared, right = right, _MIRRORED.get(compared, compared), left
        column = _only_column(left, tables)
        if column is None or not isinstance(right, exp.Literal | exp.Neg | exp.Null):
            continue
        if isinstance(left, exp.TimeToStr) and left.text("format") == "%Y":
            compared, right = "like", exp.Literal.string(f"{right.name}%")
        if isinstance(node.parent, exp.Not) or node.args.get("negate"):
            compared = _NEGATED.get(compared, "not like")
        yield column, Condition(compared, _constant(right))


def _only_column(side: exp.Expr, tables: _Tables) -> Column | None:
    """Return the column that a side of a comparison is, or is a simple function of."""
    if side.find(exp.Count, exp.Query, exp.Length):
        return None
    columns = list(side.find_all(exp.Column))
    return tables.column(columns[0]) if len(columns) == 1 else None


def _constant(node: exp.Expr) -> Value:
    if isinstance(node, exp.Null):
        return None
    name: str = node.this.name if isinstance(node, exp.Neg) else node.name
    number = None if node.is_string else _number(name)
    if number is None:
        return name
    return -number if isinstance(node, exp.Neg) else number


def _compared_columns(node: exp.Expr) -> list[exp.Column]:
    """Return the columns that a node compares with each other, which should therefore share values."""
    if isinstance(node, exp.EQ | exp.NEQ | exp.GT | exp.GTE | exp.LT | exp.LTE):
        sides = [node.left, node.right]
    elif isinstance(node, exp.In) and (inner := node.args.get("query")) is not None:
        sides = [node.this, inner]
    else:
        return []
    sides = [side.unnest() for side in sides]
    sides = [side.selects[0] if isinstance(side, exp.Query) and side.selects else side for side in sides]
    columns = [column for side in sides if (column := side.find(exp.Column))]
    return columns if len(columns) == len(sides) else []


def _join(groups: list[set[Column]], columns: set[Column]) -> None:
    """Put columns into one group with all groups that they are already in."""
    if len(columns) < 2:
        return
    for group in [group for group in groups if group & columns]:
        groups.remove(group)
        columns |= group
    groups.append(columns)


def split_values(conditions: list[Condition], *, as_number: bool) -> tuple[list[Value], list[Value]]:
    """Return values that satisfy conditions, and others that narrowly do not.

    If no value satisfies all conditions, such as two equalities, satisfy as many as possible. For a column that stores strings,
    not ``as_number``, only values are used that compare the same as strings and as numbers.
    """
    ranked: list[tuple[int, Value]] = []
    for value in dict.fromkeys(value for condition in conditions for value in _candidates(condition)):
        counts = {
            sum(condition.holds(value, as_number=reading) for condition in conditions)
            for reading in ({True} if as_number else {True, False})
        }
        if len(counts) == 1:
            ranked.append((counts.pop(), value))
    most = max((count for count, _ in ranked), default=0)
    return [v for count, v in ranked if count == most], [v for count, v in ranked if count < most]


def _candidates(condition: Condition) -> Iterator[Value]:
    """Yield values at and around a constant, the nearest first."""
    constant = condition.constant
    if constant is None:
        yield from (None, "known", 1)
    elif condition.operator.endswith("like"):
        core = str(constant).replace("_", "x")
        yield from (core.replace("%", ""), core.replace("%", " etc "), core.replace("%", "z").replace("z", "", 1))
        bare = core.replace("%", "").strip()
        yield from (f"{bare} etc", f"etc {bare}", f"etc {bare} etc", bare[:-1], "other")
    elif (number := _number(constant)) is not None:
        yield constant  # its text may differ from its number's: +8, 34.50
        numbers = [number + step for step in (0, -1, 1, -2, 2, 5, -5, 13, -13)]
        # The last three are on the same side as numbers and as strings: 95 of 9, and 0 and 1 of 10.
        numbers += [number * 2, number / 2, number * 10 + 5, 0, 1]
        whole = [int(n) if n == int(n) else n for n in numbers]
        yield from map(str, whole) if isinstance(constant, str) else whole
    elif (day := _date(str(constant))) is not None:
        yield from ((day + timedelta(days)).isoformat() for days in (0, -1, 1, -2, 2, -400, 400, 31, -31))
    else:
        text = str(constant)
        yield from (text, text.swapcase(), f"{text} 2", text[:-1], f"not {text}", f"{text[:1]}~", f"A {text}")

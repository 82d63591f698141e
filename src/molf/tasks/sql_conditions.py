"""What a query compares its columns with, and values that do and do not satisfy that."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, TypeAlias

from molf.tasks.sql_ast import Schema

if TYPE_CHECKING:
    from sqlglot import exp

Value: TypeAlias = str | int | float | None
Column: TypeAlias = tuple[str, str]
"""A table and one of its columns, in lower case."""

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_NEGATED = {"=": "!=", "!=": "=", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_ISO_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}$")
_LARGEST = 2**50


@dataclass(frozen=True)
class Condition:
    """A column's comparison with a constant.

    Attributes:
        operator: ``=``, ``!=``, ``<``, ``<=``, ``>``, ``>=``, ``like`` or ``not like``.
        constant: What it is compared with; for ``=`` and ``!=`` None stands for IS NULL and IS NOT NULL.
    """

    operator: str
    constant: Value

    def holds(self, value: Value, *, as_number: bool) -> bool:
        """Return whether a value satisfies it, compared as numbers come before texts or as texts are."""
        if value is None or self.constant is None:
            return (
                (value is None) == (self.constant is None)
                and self.operator == "="
                or (self.operator == "!=" and self.constant is None and value is not None)
            )
        if self.operator.endswith("like"):
            pattern = "".join({"%": ".*", "_": "."}.get(letter, re.escape(letter)) for letter in str(self.constant))
            matched = re.fullmatch(pattern, str(value), re.IGNORECASE | re.DOTALL) is not None
            return matched == (self.operator == "like")
        one, other = _comparable(value, as_number), _comparable(self.constant, as_number)
        return {
            "=": one == other,
            "!=": one != other,
            "<": one < other,
            "<=": one <= other,
            ">": one > other,
            ">=": one >= other,
        }[self.operator]


def _comparable(value: Value, as_number: bool) -> tuple[int, float, str]:
    number = _number(value) if as_number else None
    return (1, 0.0, str(value)) if number is None else (0, float(number), "")


def _number(value: Value) -> int | float | None:
    """Return a value as a number; None if it is none, or one whose neighbours a float cannot tell apart."""
    for kind in (int, float) if isinstance(value, str) else (float,):  # not int of 7.9, which is 7
        try:
            number = value if isinstance(value, int) else kind(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
        return number if abs(number) < _LARGEST else None
    return None


def _date(text: str) -> date | None:
    """Return the day that a text in ISO format names; None if there is no such day, or none a few years around it."""
    if not _ISO_DATE.match(text):
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:  # 30 February
        return None
    return day if 10 < day.year < 9990 else None


@dataclass(frozen=True)
class Conditions:
    """What a query asks of the tables.

    Attributes:
        of: The conditions on each column that has any.
        joined: Groups of columns that are compared with each other.
        numeric: Columns that the query reckons with.
        count: The largest number of rows that it counts or limits.
    """

    of: dict[Column, list[Condition]] = field(default_factory=dict)
    joined: list[set[Column]] = field(default_factory=list)
    numeric: set[Column] = field(default_factory=set)
    count: int = 0


def conditions_of(query: "exp.Expr", schema: Schema) -> Conditions:
    """Read the comparisons of a query wherever they stand, in subqueries too.

    Args:
        query: From ``qualified_query``.
        schema: The tables.
    """
    from sqlglot import exp

    found = Conditions(count=max([0, *_counts(query)]))
    names = _Names(query, schema)
    for node in query.walk():
        if isinstance(node, exp.Sum | exp.Avg | exp.Binary) and not isinstance(node, exp.Predicate | exp.Connector):
            found.numeric.update(names.columns(node.find_all(exp.Column)))
        for column, condition in _comparisons(node, names):
            own = found.of.setdefault(column, [])
            if condition not in own:
                own.append(condition)
        _join(found.joined, names.columns(_compared_columns(node)))
    for group in found.joined:
        shared = [condition for column in sorted(group) for condition in found.of.get(column, [])]
        if shared:
            found.of.update({column: shared for column in group})
    return found


class _Names:
    """Whose a column is."""

    def __init__(self, query: "exp.Expr", schema: Schema) -> None:
        from sqlglot import exp

        self._schema = schema
        self._tables = {table.alias_or_name: table.name for table in query.find_all(exp.Table) if table.name in schema}

    def columns(self, given: "Iterable[exp.Column]") -> set[Column]:
        return {found for column in given if (found := self.column(column)) is not None}

    def column(self, column: "exp.Column") -> Column | None:
        tables = [self._tables.get(column.table)] if column.table else list(self._tables.values())
        return next(((table, column.name) for table in tables if table and column.name in self._schema[table]), None)


def _counts(query: "exp.Expr") -> Iterator[int]:
    """Yield the numbers of rows that a query counts or limits."""
    from sqlglot import exp

    for node in query.find_all(exp.Limit, exp.Offset, exp.Binary):
        if isinstance(node, exp.Binary) and not isinstance(node.left, exp.Count):
            continue
        if isinstance(node.expression, exp.Literal) and isinstance(count := _number(node.expression.name), int):
            yield count


def _comparisons(node: "exp.Expr", names: _Names) -> Iterator[tuple[Column, Condition]]:
    """Yield the conditions that a node of a query is."""
    from sqlglot import exp

    operators: dict[type[exp.Expr], str] = {
        exp.EQ: "=",
        exp.Is: "=",
        exp.NEQ: "!=",
        exp.LT: "<",
        exp.LTE: "<=",
        exp.GT: ">",
        exp.GTE: ">=",
    }
    if isinstance(node, exp.Like):
        raw = [(node.this, "like", node.expression)]
    elif isinstance(node, exp.In):
        raw = [(node.this, "=", option) for option in node.expressions]
    elif isinstance(node, exp.Between):
        raw = [(node.this, ">=", node.args["low"]), (node.this, "<=", node.args["high"])]
    elif type(node) in operators:
        raw = [(node.this, operators[type(node)], node.expression)]
    else:
        return
    for left, operator, right in raw:
        if isinstance(left, exp.Literal):
            left, operator, right = right, _MIRRORED.get(operator, operator), left
        column = _plain_column(left, names)
        if column is None or not (isinstance(right, exp.Literal | exp.Neg | exp.Null)):
            continue
        if _is_year(left):
            operator, right = "like", exp.Literal.string(f"{right.name}%")
        if isinstance(node.parent, exp.Not) or node.args.get("negate"):
            operator = _NEGATED.get(operator, "not like")
        yield column, Condition(operator, _constant(right))


def _plain_column(side: "exp.Expr", names: _Names) -> Column | None:
    """Return the column that a side of a comparison is, or is a simple function of; not of a count."""
    from sqlglot import exp

    if side.find(exp.Count, exp.Query, exp.Length):
        return None
    columns = list(side.find_all(exp.Column))
    return names.column(columns[0]) if len(columns) == 1 else None


def _is_year(side: "exp.Expr") -> bool:
    from sqlglot import exp

    return isinstance(side, exp.TimeToStr) and side.text("format") == "%Y"


def _constant(node: "exp.Expr") -> Value:
    from sqlglot import exp

    if isinstance(node, exp.Null):
        return None
    if isinstance(node, exp.Neg):
        number = _number(node.this.name)
        return -number if number is not None else node.this.name
    return node.name if node.is_string else (_number(node.name) if _number(node.name) is not None else node.name)


def _compared_columns(node: "exp.Expr") -> "list[exp.Column]":
    """Return the columns that a node compares with each other, which should therefore have values in common."""
    from sqlglot import exp

    if isinstance(node, exp.EQ | exp.NEQ | exp.GT | exp.GTE | exp.LT | exp.LTE):
        sides = [node.left, node.right]
    elif isinstance(node, exp.In) and (inner := node.args.get("query")) is not None:
        sides = [node.this, inner]
    else:
        return []
    sides = [side.unnest() for side in sides]
    sides = [side.selects[0] if isinstance(side, exp.Query) and side.selects else side for side in sides]
    columns = [column for side in sides if (column := side if isinstance(side, exp.Column) else side.find(exp.Column))]
    return columns if len(columns) == len(sides) else []


def _join(groups: list[set[Column]], columns: set[Column]) -> None:
    """Put columns into one group, together with the groups that they are in already."""
    if len(columns) < 2:
        return
    for group in [group for group in groups if group & columns]:
        groups.remove(group)
        columns |= group
    groups.append(columns)


def split_values(conditions: list[Condition], *, as_number: bool) -> tuple[list[Value], list[Value]]:
    """Return values that satisfy conditions, and others that narrowly do not.

    Of conditions that no value satisfies together, such as two equalities, as many as possible.

    Args:
        conditions: The conditions on a column.
        as_number: Whether the column stores numbers. In one that stores texts, only such values are used as compare
            in the same way as texts and as numbers.
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
        yield constant  # a text may be more than its number: +8, 34.50
        numbers = [number + step for step in (0, -1, 1, -2, 2, 5, -5, 13, -13)]
        # The last three are on one side as numbers and as texts too: 95 of 9, and 0 and 1 of 10.
        numbers += [number * 2, number / 2, number * 10 + 5, 0, 1]
        whole = [int(n) if n == int(n) else n for n in numbers]
        yield from map(str, whole) if isinstance(constant, str) else whole
    elif (day := _date(str(constant))) is not None:
        yield from ((day + timedelta(days)).isoformat() for days in (0, -1, 1, -2, 2, -400, 400, 31, -31))
    else:
        text = str(constant)
        yield from (text, text.swapcase(), f"{text} 2", text[:-1], f"not {text}", f"{text[:1]}~", f"A {text}")

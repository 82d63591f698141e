"""SQL as a syntax tree, by sqlglot, in SQLite's dialect: what a context declares, and what a query means.

sqlglot is imported by the functions that need it, so that other benchmarks work without it.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from sqlglot import exp

DIALECT = "sqlite"
_MAX_LENGTH = 20_000  # characters; what is longer is no answer to a question, and takes long to parse

Schema: TypeAlias = dict[str, dict[str, str]]
"""Tables, each with its columns and their declared types, in lower case."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep sqlglot from warning of everything that it does not know: models write a lot of that."""
    logger = logging.getLogger("sqlglot")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet()
def statements(sql: str) -> "list[exp.Expr] | None":
    """Parse statements; None if sqlglot cannot, which does not mean that SQLite cannot."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    if len(sql) > _MAX_LENGTH:
        return None
    try:
        parsed = sqlglot.parse(sql, dialect=DIALECT)
    except (SqlglotError, RecursionError):  # deep nesting
        return None
    # A Command is a statement that sqlglot took as it is.
    return None if any(isinstance(one, exp.Command) for one in parsed) else [one for one in parsed if one is not None]


def schema_of(context: str) -> Schema:
    """Return the tables that a context creates; those that sqlglot does not understand are missing."""
    from sqlglot import exp

    schema: Schema = {}
    for statement in statements(context) or []:
        declared = statement.this
        if isinstance(statement, exp.Create) and isinstance(declared, exp.Schema):
            schema[declared.this.name.lower()] = {
                column.name.lower(): kind.sql(DIALECT) if (kind := column.args.get("kind")) else ""
                for column in declared.expressions
                if isinstance(column, exp.ColumnDef | exp.Identifier)  # the latter without a type
            }
    return schema


def parse_query(sql: str, schema: Schema) -> "exp.Expr | None":
    """Parse one statement, names in lower case and double quotes read as SQLite does; None if that cannot be done.

    In SQLite a name in double quotes that is no column is a text, which many published queries rely on.
    """
    from sqlglot import exp

    parsed = statements(sql)
    if parsed is None or len(parsed) != 1:
        return None
    columns = {column for table in schema.values() for column in table}

    def read(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Column) and not node.table and isinstance(node.this, exp.Identifier):
            unknown = node.name.lower() not in columns
            return exp.Literal.string(node.name) if unknown and node.this.quoted else node
        if isinstance(node, exp.Identifier):
            return exp.to_identifier(node.name.lower(), quoted=False)
        return node

    return parsed[0].transform(read)


@_quiet()
def qualified_query(sql: str, schema: Schema) -> "exp.Expr | None":
    """Parse one statement, with every column led by its table and every table under a name of its own.

    Returns:
        The statement, or None where sqlglot does not understand it.
    """
    from sqlglot.errors import SqlglotError
    from sqlglot.optimizer.qualify import qualify

    query = parse_query(sql, schema)
    if query is None:
        return None
    try:
        return qualify(
            query,
            dialect=DIALECT,
            schema=dict(schema),
            validate_qualify_columns=False,
            quote_identifiers=False,
            identify=False,
            canonicalize_table_aliases=True,
        )
    except (SqlglotError, RecursionError):
        return None


@_quiet()
def logic_of(sql: str, schema: Schema) -> str | None:
    """Return a query in a form that is the same for queries which say the same thing in other words.

    Formatting, case, aliases, qualified or bare column names, ``*`` or the columns it stands for, ASC, INNER, and the order
    of what AND, OR and = join make no difference.

    Returns:
        The form, or None where sqlglot does not understand the query.
    """
    from sqlglot.errors import SqlglotError

    query = qualified_query(sql, schema)
    if query is None:
        return None
    try:
        _expand_order(query)
        _rename_outputs(query)
        return _ordered(query).sql(DIALECT, comments=False)
    except (SqlglotError, RecursionError):
        return None


def _rename_outputs(query: "exp.Expr") -> None:
    """Name the columns of every query by their place, and CTEs by theirs."""
    from sqlglot import exp
    from sqlglot.optimizer.scope import Scope, traverse_scope

    scopes = traverse_scope(query)
    queries = [scope.expression for scope in scopes if isinstance(scope.expression, exp.Query)]
    places = {id(one): {name: f"c{place}" for place, name in enumerate(one.named_selects)} for one in queries}
    for scope in scopes:
        for column in scope.columns:
            source = scope.sources.get(column.table)
            names = places.get(id(source.expression), {}) if isinstance(source, Scope) else {}
            if column.name in names:
                column.set("this", exp.to_identifier(names[column.name]))
    for one in queries:
        for place, selected in enumerate(one.selects):
            if isinstance(selected, exp.Alias):
                selected.set("alias", exp.to_identifier(f"c{place}"))
    ctes = {cte.alias: f"w{place}" for place, cte in enumerate(query.find_all(exp.CTE))}
    for table in query.find_all(exp.Table):
        if table.name in ctes and not table.db:
            table.set("this", exp.to_identifier(ctes[table.name]))
    for cte in query.find_all(exp.CTE):
        cte.set("alias", exp.TableAlias(this=exp.to_identifier(ctes[cte.alias])))


def _expand_order(query: "exp.Expr") -> None:
    """Let every ORDER BY say what it orders by, not the name that this has among the selected columns."""
    from sqlglot import exp

    for one in list(query.find_all(exp.Query)):
        order = one.args.get("order")
        if order is None:
            continue
        if isinstance(one, exp.Select):
            meant = {selected.alias: selected.this for selected in one.selects if isinstance(selected, exp.Alias)}
        else:  # of a UNION only the place can be named
            meant = {name: exp.column(f"c{place}") for place, name in enumerate(one.named_selects)}
        for column in list(order.find_all(exp.Column)):
            if not column.table and column.name in meant:
                column.replace(meant[column.name].copy())


def _ordered(query: "exp.Expr") -> "exp.Expr":
    """Bring what may be said in any order into one, and drop words that change nothing."""
    from sqlglot import exp

    for node in reversed(list(query.walk(bfs=True))):  # children before their parents
        if isinstance(node, exp.And | exp.Or):
            if type(node.parent) is type(node):  # sorted with the whole chain
                continue
            operands = sorted((operand.copy() for operand in node.flatten()), key=lambda one: one.sql(DIALECT))
            joined = operands[0]
            for operand in operands[1:]:
                joined = type(node)(this=joined, expression=operand)
            node.set("this", joined.this)
            node.set("expression", joined.expression)
        elif isinstance(node, exp.EQ | exp.NEQ) and node.left.sql(DIALECT) > node.right.sql(DIALECT):
            left, right = node.left.copy(), node.right.copy()
            node.set("this", right)
            node.set("expression", left)
        elif isinstance(node, exp.Ordered) and not node.args.get("desc"):
            node.set("desc", None)
        elif isinstance(node, exp.Join) and node.kind == "INNER":
            node.set("kind", None)
    return query


def is_ordered(sql: str, schema: Schema) -> bool:
    """Return whether the order of a query's rows is part of its meaning: it ends in ORDER BY."""
    query = parse_query(sql, schema)
    return query is not None and query.args.get("order") is not None

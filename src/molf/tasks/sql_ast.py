"""SQL as sqlglot's syntax trees, in SQLite's dialect: what a context declares, and what a query means."""

import logging
from functools import lru_cache
from typing import TypeAlias

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.qualify import qualify
from sqlglot.optimizer.scope import Scope, traverse_scope

DIALECT = "sqlite"
_MAX_LENGTH = 20_000  # characters; longer text is no answer to a question, and slow to parse

Schema: TypeAlias = dict[str, dict[str, str]]
"""Tables, each with its columns and their declared types, in lower case."""

logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns about everything unknown, which models write a lot of


def statements(sql: str) -> list[exp.Expr] | None:
    """Parse statements; None if sqlglot cannot, which does not mean that SQLite cannot."""
    if len(sql) > _MAX_LENGTH:
        return None
    try:
        parsed = sqlglot.parse(sql, dialect=DIALECT)
    except (SqlglotError, RecursionError):  # deep nesting
        return None
    # A Command is a statement that sqlglot did not parse.
    return None if any(isinstance(one, exp.Command) for one in parsed) else [one for one in parsed if one is not None]


@lru_cache(maxsize=1024)
def schema_of(context: str) -> Schema:
    """Return the tables that a context creates, except those that sqlglot cannot parse."""
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


def parse_query(sql: str, schema: Schema) -> exp.Expr | None:
    """Parse one statement, with names in lower case; None if sqlglot cannot.

    As in SQLite, a name in double quotes that is no column is a string, which many published queries rely on.
    """
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


def is_ordered(sql: str, schema: Schema) -> bool:
    """Return whether the order of a query's rows matters: it ends in ORDER BY."""
    query = parse_query(sql, schema)
    return query is not None and query.args.get("order") is not None


def qualified_query(sql: str, schema: Schema) -> exp.Expr | None:
    """Parse one statement, every column qualified by its table, every table under its own name; None if sqlglot cannot."""
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


def logic_of(sql: str, schema: Schema) -> str | None:
    """Return a normal form that is equal for queries that say the same in different words; None if sqlglot cannot.

    It does not depend on formatting, case, aliases, qualified or bare column names, ``*`` or the columns it stands for, ASC,
    INNER, and the order of operands of AND, OR and =.
    """
    query = qualified_query(sql, schema)
    if query is None:
        return None
    try:
        _resolve_order_by(query)
        _rename_outputs(query)
        _sort_operands(query)
        return query.sql(DIALECT, comments=False)
    except (SqlglotError, RecursionError):
        return None


def _resolve_order_by(query: exp.Expr) -> None:
    """Replace aliases of selected columns in ORDER BY by what they stand for."""
    for one in list(query.find_all(exp.Query)):
        order = one.args.get("order")
        if order is None:
            continue
        if isinstance(one, exp.Select):
            meant = {selected.alias: selected.this for selected in one.selects if isinstance(selected, exp.Alias)}
        else:  # the columns of a UNION have places only
            meant = {name: exp.column(f"c{place}") for place, name in enumerate(one.named_selects)}
        for column in list(order.find_all(exp.Column)):
            if not column.table and column.name in meant:
                column.replace(meant[column.name].copy())


def _rename_outputs(query: exp.Expr) -> None:
    """Name the columns of every query, and the CTEs, by their place."""
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


def _sort_operands(query: exp.Expr) -> None:
    """Sort the operands of AND, OR, = and <>, and drop keywords without effect."""
    for node in reversed(list(query.walk(bfs=True))):  # children before their parents
        if isinstance(node, exp.And | exp.Or):
            if type(node.parent) is type(node):  # sorted with the whole chain
                continue
            operands = sorted((operand.copy() for operand in node.flatten()), key=lambda one: one.sql(DIALECT))
            chain = operands[0]
            for operand in operands[1:]:
                chain = type(node)(this=chain, expression=operand)
            node.set("this", chain.this)
            node.set("expression", chain.expression)
        elif isinstance(node, exp.EQ | exp.NEQ) and node.left.sql(DIALECT) > node.right.sql(DIALECT):
            left, right = node.left.copy(), node.right.copy()
            node.set("this", right)
            node.set("expression", left)
        elif isinstance(node, exp.Ordered) and not node.args.get("desc"):
            node.set("desc", None)
        elif isinstance(node, exp.Join) and node.kind == "INNER":
            node.set("kind", None)

"""How well made-up rows tell wrong queries from right ones, against empty tables.

    python benchmarks/sql_rows.py

Takes the reference queries of the packaged SQL slice, and makes from each the wrong variants that one change gives. Prints
how many references have a result with anything but NULL and 0 in it, and how many of the variants that run have another
result than their reference. Some variants cannot be told apart on any rows, such as MIN and MAX of a column that is
compared for equality.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator

from sqlglot import exp

from molf.tasks.sql import Sql, reference
from molf.tasks.sql_ast import DIALECT, is_ordered, parse_query, schema_of
from molf.tasks.sql_metrics import same_rows
from molf.tasks.sql_rows import filled_context
from molf.tasks.sql_sandbox import SqlSandbox

COMPARISONS = {
    exp.EQ: [exp.NEQ, exp.GTE, exp.LTE],
    exp.NEQ: [exp.EQ],
    exp.LT: [exp.LTE, exp.GT],
    exp.LTE: [exp.LT, exp.GTE],
    exp.GT: [exp.GTE, exp.LT],
    exp.GTE: [exp.GT, exp.LTE],
}
AGGREGATES = [exp.Min, exp.Max, exp.Sum, exp.Avg, exp.Count]


def other_columns(column, schema):
    """Return the other columns of the tables that have this one."""
    tables = [columns for columns in schema.values() if column.name in columns]
    return [name for columns in tables for name in columns if name != column.name]


def replacements(node, schema) -> Iterator[tuple[str, exp.Expr]]:
    """Yield what a node could wrongly be: the kind of the change, and the other node."""
    if isinstance(node, exp.Column):
        place = node.find_ancestor(exp.Count, exp.Where, exp.Join, exp.Order, exp.Group, exp.Select)
        kind = {"count": "counted column", "select": "selected column"}.get(place.key, "other column")
        for name in other_columns(node, schema):
            yield kind, exp.column(name, table=node.args.get("table"))
    elif isinstance(node, exp.Literal):
        if node.is_string:
            yield from (
                ("literal", exp.Literal.string(text))
                for text in (node.name + "s", node.name[:-1], node.name.swapcase())
            )
        else:
            number = float(node.name) if "." in node.name else int(node.name)
            yield from (("literal", exp.Literal.number(number + step)) for step in (1, -1))
    elif type(node) in AGGREGATES:
        yield from (("aggregate", kind(this=node.this.copy())) for kind in AGGREGATES if not isinstance(node, kind))
        yield "aggregate", node.this.copy()
    elif type(node) in COMPARISONS:
        for kind in COMPARISONS[type(node)]:
            yield "comparison", kind(this=node.left.copy(), expression=node.right.copy())
    elif isinstance(node, exp.And):
        yield from (("condition", side.copy()) for side in (node.left, node.right))
        yield "condition", exp.Or(this=node.left.copy(), expression=node.right.copy())


def variants(query, schema) -> Iterator[tuple[str, str]]:
    """Yield every wrong variant of a query with the kind of its change."""
    for number, node in enumerate(query.walk()):
        for kind, replacement in replacements(node, schema):
            changed = query.copy()
            target = next(other for place, other in enumerate(changed.walk()) if place == number)
            changed = replacement if target is changed else (target.replace(replacement), changed)[1]
            yield kind, changed.sql(DIALECT)
    where = query.args.get("where")
    if where is not None:
        changed = query.copy()
        changed.set("where", None)
        yield "condition", changed.sql(DIALECT)


def told_apart(context, gold, wrong, sandbox):
    """Return for each wrong query that runs whether its result differs from the gold's, else None; and the gold's rows."""
    right, *found = sandbox.execute_many([(context, gold), *((context, sql) for sql in wrong)])
    ordered = is_ordered(gold, schema_of(context))
    return [None if not one.ok else not same_rows(one.rows, right.rows, ordered=ordered) for one in found], right.rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="the first queries only")
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--show", action="store_true", help="print every variant that filled rows do not tell apart")
    args = parser.parse_args()
    counts = {"filled": Counter(), "empty": Counter()}
    total, full = Counter(), Counter()
    usable = 0
    sandbox = SqlSandbox()
    for row in Sql().load(sample=True, limit=args.limit).eval:
        schema, gold = schema_of(row["sql_context"]), reference(row)
        query = parse_query(gold, schema)
        if query is None or not sandbox.execute(row["sql_context"], gold).ok:
            continue
        usable += 1
        unchanged = query.sql(DIALECT)
        made = dict.fromkeys(made for made in variants(query, schema) if made[1] != unchanged)
        kinds, wrong = zip(*made, strict=True)
        contexts = {"filled": filled_context(row["sql_context"], gold), "empty": row["sql_context"]}
        for name, context in contexts.items():
            differs, rows = told_apart(context, gold, wrong, sandbox)
            full[name] += any(cell not in (None, 0) for cells in rows for cell in cells)
            for kind, sql, outcome in zip(kinds, wrong, differs, strict=True):
                counts[name][kind] += outcome is True
                total[kind] += name == "filled" and outcome is not None
                if args.show and name == "filled" and outcome is False:
                    print(f"{kind}: {gold}\n    {sql}")
    report(usable, full, total, counts, args.json)


def report(usable, full, total, counts, as_json):
    shares = {name: {kind: count[kind] / total[kind] for kind in sorted(total)} for name, count in counts.items()}
    for name, count in counts.items():
        shares[name] |= {"all": sum(count.values()) / total.total(), "results": full[name] / usable}
    print(f"{usable} references, {total.total()} wrong variants; in percent\n{'':28}{'filled':>8}{'empty':>8}")
    print(f"{'references with a result':28}{shares['filled']['results']:8.1%}{shares['empty']['results']:8.1%}")
    for kind in (*sorted(total), "all"):
        count = total[kind] if kind != "all" else total.total()
        print(f"{f'told apart: {kind} ({count})':28}{shares['filled'][kind]:8.1%}{shares['empty'][kind]:8.1%}")
    if as_json:
        print(json.dumps(shares))


if __name__ == "__main__":
    main()

"""How many queries a second the SQL sandbox runs, and what a flood of mutated queries does to it.

    python benchmarks/sql_sandbox.py [--executions 10000] [--workers 2] [--fuzz 20000] [--json]

The rate is that of the packaged gold queries, beside a process of its own for every query (the naive way) in the same run.
With `--fuzz N`, N mutations of gold queries run as well: pieces of other queries and of hostile statements spliced in, parts
cut, doubled or scrambled. Reported are how they ended, the longest one, and what they left: files and processes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from molf.tasks import get_task
from molf.tasks.sql_sandbox import Limits, SqlSandbox

SPLICES = [
    "ATTACH 'x.db' AS x;", "VACUUM INTO 'x.db';", "PRAGMA user_version=1;", "load_extension('x')", "writefile('x','y')",
    "randomblob(1000000000)", "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c) SELECT max(x) FROM c;",
    "zeroblob(1e9)", "printf('%.*c', 1e9, 'x')", "(" * 3000, "\0", "\udcff", ";" * 50, "'" * 7, "--", "/*", "UNION ALL",
    "CROSS JOIN sqlite_master a CROSS JOIN sqlite_master b", "CREATE VIRTUAL TABLE v USING fts5(x);", "9" * 400,
]  # fmt: skip


def mutated(sql, others, dice):
    """Return a query after one to four random changes."""
    for _ in range(dice.randint(1, 4)):
        at, to = sorted(dice.randrange(len(sql) + 1) for _ in range(2))
        kind = dice.randrange(6)
        if kind == 0:
            sql = sql[:at] + dice.choice(SPLICES) + sql[at:]
        elif kind == 1:
            sql = sql[:at] + sql[to:]
        elif kind == 2:
            sql = sql[:to] + sql[at:to] * dice.randint(1, 20) + sql[to:]
        elif kind == 3:
            other = dice.choice(others)
            sql = sql[:at] + other[dice.randrange(len(other)) :]
        elif kind == 4:
            sql = (
                sql[:at] + "".join(dice.choice(" '\"();,*=<>%_\\\n\x01é") for _ in range(dice.randint(1, 5))) + sql[to:]
            )
        else:
            words = sql.split(" ")
            dice.shuffle(words)
            sql = " ".join(words)
    return sql


def fuzz(queries, count, workers, seed=1):
    """Run mutated queries and report what became of them."""
    dice = random.Random(seed)
    golds = [sql for _, sql in queries]
    limits = Limits(seconds=1.0)
    before = set(os.listdir())
    outcomes, longest = Counter(), 0.0
    with SqlSandbox(workers, limits) as sandbox:
        folder = Path(sandbox._folder.name)
        for first in range(0, count, 500):
            for _ in range(min(500, count - first)):
                context, sql = dice.choice(queries)
                began = time.perf_counter()
                found = sandbox.execute(context, mutated(sql, golds, dice))
                longest = max(longest, time.perf_counter() - began)
                outcomes["ran" if found.ok else "refused"] += 1
            assert not os.listdir(folder), f"files appeared: {os.listdir(folder)}"
        replaced = sandbox.replaced
    left = subprocess.run(["pgrep", "-f", "sql_worker.py"], capture_output=True, text=True).stdout.split()
    return {
        "inputs": count, **outcomes, "replaced_workers": replaced, "longest_s": round(longest, 2),
        "files_left": len(set(os.listdir()) - before), "processes_left": len(left),
    }  # fmt: skip


def rate(run, count):
    began = time.perf_counter()
    run(count)
    return count / (time.perf_counter() - began)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executions", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fuzz", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="make the last line a JSON object")
    args = parser.parse_args()
    rows = get_task("sql").load(None, sample=True, limit=None, seed=0).eval
    queries = [(row["sql_context"], row["sql"]) for row in rows]

    def pooled(count):
        with SqlSandbox(args.workers) as sandbox:
            sandbox.execute_many(queries[i % len(queries)] for i in range(count))

    def naive(count):
        for i in range(count):
            with SqlSandbox(1) as sandbox:
                sandbox.execute(*queries[i % len(queries)])

    report = {
        "per_second": rate(pooled, args.executions),
        "naive_per_second": rate(naive, max(1, args.executions // 200)),
    }
    report["ratio"] = report["per_second"] / report["naive_per_second"]
    print(f"{args.executions} executions, {args.workers} workers: {report['per_second']:.0f} a second, in all "
          f"{args.executions / report['per_second']:.1f} s; a process for each: {report['naive_per_second']:.1f} a second, "
          f"so x{report['ratio']:.0f}")  # fmt: skip
    if args.fuzz:
        report["fuzz"] = fuzz(queries, args.fuzz, args.workers)
        print("mutated queries: " + ", ".join(f"{name} {value}" for name, value in report["fuzz"].items()))
    if args.json:
        print(json.dumps(report))
    if args.fuzz and (report["fuzz"]["files_left"] or report["fuzz"]["processes_left"]):
        sys.exit("something was left behind")


if __name__ == "__main__":
    main()

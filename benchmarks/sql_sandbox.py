"""How many queries a second the SQL sandbox runs, and what a flood of mutated queries does to it.

    python benchmarks/sql_sandbox.py [--executions 10000] [--workers 2] [--fuzz 20000] [--json]

The rate is that of the packaged gold queries, beside a process of its own for every query (the naive way) in the same run.
With `--fuzz N`, N mutations of gold queries run as well: words moved, doubled or taken from other queries, hostile expressions
and statements put in, queries joined, nested and multiplied, characters broken. Reported are how they ended, the longest time
of 500, and what they left: files and processes.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter

from molf.tasks import get_task
from molf.tasks.sql_sandbox import Limits, SqlSandbox

_ENDLESS = "(WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT max(x) FROM c)"
# In place of a name, a number or a text of a query: what takes memory or time, or asks for what is refused.
EXPRESSIONS = [
    "randomblob(1000000000)", "hex(randomblob(3000000))", "printf('%.*c', 1000000000, 'x')", "load_extension('x')",
    "writefile('x', 'y')", "readfile('/etc/passwd')", "(SELECT group_concat(sql) FROM sqlite_master)", "9e999", "x'ff00'", "-1",
    "(SELECT count(*) FROM pragma_database_list)", "NULL", "1" * 400, "(" * 300 + "1" + ")" * 300, "count(*) OVER ()", "'\udcff'",
]  # fmt: skip
STATEMENTS = [
    "ATTACH 'x.db' AS x", "VACUUM INTO 'x.db'", "PRAGMA user_version = 1", "CREATE TEMP TABLE x AS SELECT 1", "DROP TABLE x",
    "CREATE VIRTUAL TABLE v USING fts5(x)", "INSERT INTO sqlite_master VALUES (1)", "BEGIN", "ROLLBACK", ";" * 50, "\0",
]  # fmt: skip
_WORD = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\w+|\S")


def mutated(sql, others, dice):
    """Return a query after one to three random changes; some of them can still run."""
    for _ in range(dice.randint(1, 3)):
        words = _WORD.findall(sql.rstrip("; "))
        place = dice.randrange(len(words)) if words else 0
        kind = dice.randrange(9)
        if kind == 0:  # a word that is no keyword becomes an expression; seldom one that would run for ever
            names = [at for at, word in enumerate(words) if word[0].isalnum() and not word.isupper()]
            at = dice.choice(names or [0])
            words[at : at + 1] = [_ENDLESS if dice.random() < 0.02 else dice.choice(EXPRESSIONS)]
        elif kind == 1:  # words change places, go, or come twice
            words.insert(dice.randrange(len(words) + 1), words.pop(place) if words else "SELECT")
        elif kind == 2:
            words[place : place + dice.randint(1, 3)] = words[place : place + 1] * dice.randint(0, 5)
        elif kind == 3:  # another query's words
            other = _WORD.findall(dice.choice(others))
            words[place : place + 1] = [dice.choice(other)]
        elif kind == 4:
            words = [*words, dice.choice(["UNION ALL", "EXCEPT", "UNION", ";"]), dice.choice(others)]
        elif kind == 5:
            words = (
                [dice.choice(STATEMENTS), ";", *words]
                if dice.random() < 0.5
                else [*words, ";", dice.choice(STATEMENTS)]
            )
        elif kind == 6:  # every row with every row
            words = [
                "SELECT count(*) FROM",
                ", ".join(f"({' '.join(words)}) AS q{i}" for i in range(dice.choice([1, 2, 12]))),
            ]
        elif kind == 7:  # nested
            depth = dice.choice([1, 3, 30, 300])
            words = ["SELECT * FROM ("] * depth + words + [")"] * depth
        else:  # broken characters
            text = list(sql)
            for _ in range(dice.randint(1, 4)):
                text.insert(dice.randrange(len(text) + 1), dice.choice("'\"();,*=<>%_\\\n\0\x01\udcffé"))
            words = ["".join(text)]
        sql = " ".join(words)
    return sql


def fuzz(queries, count, workers, seed=1):
    """Run mutated queries and report what became of them."""
    dice = random.Random(seed)
    golds = [sql for _, sql in queries]
    limits = Limits(seconds=0.5)
    before = set(os.listdir())
    outcomes, longest = Counter(), 0.0
    for first in range(0, count, 500):
        chosen = [dice.choice(queries) for _ in range(min(500, count - first))]
        began = time.perf_counter()
        found = SqlSandbox(workers, limits).execute_many(
            (context, mutated(sql, golds, dice)) for context, sql in chosen
        )
        longest = max(longest, time.perf_counter() - began)
        outcomes.update("ran" if one.ok else "refused" for one in found)
        outcomes["ended_their_worker"] += sum("its worker" in (one.error or "") for one in found)
    left = subprocess.run(
        ["pgrep", "-f", "-P", str(os.getpid()), "sql_worker.py"], capture_output=True, text=True
    ).stdout.split()
    return {
        "inputs": count, **outcomes, "longest_500_s": round(longest, 2),
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
        SqlSandbox(args.workers).execute_many(queries[i % len(queries)] for i in range(count))

    def naive(count):
        for i in range(count):
            SqlSandbox(1).execute(*queries[i % len(queries)])

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

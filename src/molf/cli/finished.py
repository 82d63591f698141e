"""``molf results``: any number of runs in one table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def results(argv: Sequence[str]) -> None:
    """Carry out ``molf results``.

    Raises:
        ValueError: There is no readable result, or with ``--strict`` an unreadable one; the others are shown before.
    """
    parser = argparse.ArgumentParser(
        prog="molf results", description="Gather the results of any number of runs.", allow_abbrev=False
    )
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="folder with runs in it, at any depth")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all settings and measurements as CSV")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="the same as Parquet")
    parser.add_argument("--strict", action="store_true", help="fail where a result cannot be read")
    given = parser.parse_args(argv)

    from molf.study.results.gather import gather, write_csv, write_parquet
    from molf.study.results.tables import runs_table

    found = gather(given.places)
    console = Console(soft_wrap=True, highlight=False)
    if found.results:
        console.print(runs_table(found.results))
    for path, write in ((given.csv, write_csv), (given.parquet, write_parquet)):
        if path is not None and found.results:
            write(path, found.rows())
            console.print(f"{len(found.results)} runs written to {path}", markup=False)
    for reason in found.unreadable.values():
        console.print(f"skipped: {reason}", markup=False)
    if found.unreadable and (given.strict or not found.results):
        raise ValueError(
            f"{len(found.unreadable)} of {len(found.results) + len(found.unreadable)} results cannot be read"
        )
    if found.unreadable:
        console.print(f"{len(found.unreadable)} unreadable results skipped")

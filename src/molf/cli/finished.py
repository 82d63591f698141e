"""The commands about finished runs: ``molf results``, ``molf report`` and ``molf export``."""

import argparse
from collections.abc import Sequence

from molf.cli.parsing import user_path
from molf.cli.show import console, write_page
from molf.errors import MolfError, UsageError


def results(argv: Sequence[str]) -> None:
    """``molf results``: any number of runs in one table."""
    parser = argparse.ArgumentParser(
        prog="molf results", description="Gather the results of any number of runs.", allow_abbrev=False
    )
    parser.add_argument("places", nargs="+", type=user_path, metavar="DIR", help="folder with runs in it, at any depth")
    parser.add_argument("--csv", type=user_path, metavar="FILE", help="write all settings and measurements as CSV")
    parser.add_argument("--parquet", type=user_path, metavar="FILE", help="the same as Parquet")
    parser.add_argument("--strict", action="store_true", help="fail if a result cannot be read")
    given = parser.parse_args(argv)

    from molf.study.results.gather import check_log, check_parquet, gather
    from molf.study.results.tables import runs_table

    for path, check in ((given.csv, check_log), (given.parquet, check_parquet)):
        if path is not None:
            check(path)
    found = gather(given.places)
    out = console()
    if found.results:
        out.print(runs_table(found.results))
        for path, write in ((given.csv, found.write_csv), (given.parquet, found.write_parquet)):
            if path is not None:
                try:
                    write(path)
                except OSError as error:
                    if isinstance(error, MolfError):
                        raise
                    raise MolfError(f"cannot write {path}: {error.strerror or error}; choose another path") from error
                out.print(f"{len(found.results)} runs written to {path}")
    for reason in found.unreadable.values():
        out.print(f"skipped: {reason}")
    count = len(found.unreadable)
    if count and (given.strict or not found.results):
        raise MolfError(f"{count} of {count + len(found.results)} results cannot be read")
    if count:
        out.print(f"{count} unreadable results skipped")


def report(argv: Sequence[str]) -> None:
    """``molf report``: tables of finished runs, and their routing pictures drawn again."""
    parser = argparse.ArgumentParser(prog="molf report", description="Show finished runs.")
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--check", action="store_true", help="compute the metrics again from the predictions")
    parser.add_argument(
        "--html", type=user_path, metavar="FILE", help="write one page about all runs, which needs no network"
    )
    parser.add_argument(
        "--follow", action="store_true", help="show the routing of one run in a table while it goes on, until it ends"
    )
    given = parser.parse_args(argv)

    from molf.study.results.result import check_predictions, folder_of, read_result

    if given.follow:
        if len(given.runs) > 1 or given.check or given.html is not None:
            raise UsageError("--follow shows one run that goes on; leave --check, --html and other runs out")
        from molf.study.run.follow import follow

        return follow(folder_of(given.runs[0]), console())

    from molf.study.results.tables import PICTURE_FILE, draw_log, metrics_table, runs_table

    found = {folder: read_result(folder) for folder in map(folder_of, given.runs)}
    out = console()
    for folder, result in found.items():
        out.print(metrics_table(result))
        if given.check:
            check_predictions(folder, result)
            out.print("computed again from the predictions: the same metrics")
        try:
            if draw_log(folder, title=str(result.config.get("run_name", folder.name))) is not None:
                out.print(f"routing: {folder / PICTURE_FILE}")
        except OSError as error:  # runs may be kept where nothing can be written
            out.print(f"routing: no picture, as {folder / PICTURE_FILE} cannot be written ({_reason(error)})")
    if len(found) > 1:
        out.print(runs_table({str(folder): result for folder, result in found.items()}))
    if given.html is not None:
        write_page(list(found), given.html)


def _reason(error: OSError) -> str:
    """Return why a file could not be written, without its name."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return cause.strerror or str(cause)


def export(argv: Sequence[str]) -> None:
    """``molf export``: the LoRA experts of a run, as one adapter or merged."""
    parser = argparse.ArgumentParser(prog="molf export", description="Write the LoRA experts of a molf_e run.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="folder of the run")
    parser.add_argument("--to", choices=("peft", "merged"), required=True, help="one PEFT LoRA, or a plain checkpoint")
    parser.add_argument("--output_dir", "--output-dir", type=user_path, help="where to write (default: RUN/export-TO)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="type of merged weights (default: %(default)s)"
    )
    given = parser.parse_args(argv)

    from molf.study.run.export import export_run

    for note in export_run(given.run, given.to, given.output_dir, given.dtype):
        console().print(note)

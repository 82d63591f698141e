"""``molf export``: the LoRA experts of a run, as one adapter or merged."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def export(argv: Sequence[str]) -> None:
    """Carry out ``molf export`` and say what came out."""
    parser = argparse.ArgumentParser(prog="molf export", description="Write the LoRA experts of a molf_e run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--to", choices=("peft", "merged"), required=True, help="one PEFT LoRA, or a plain checkpoint")
    parser.add_argument("--output_dir", "--output-dir", type=Path, help="where to write (default: RUN/export-TO)")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=dtypes, default="float32", help="type of merged weights (default: %(default)s)"
    )
    given = parser.parse_args(argv)

    from molf.study.run.export import export_run

    exported = export_run(given.run, given.to, given.output_dir, given.dtype)
    console = Console(soft_wrap=True, highlight=False)
    for note in exported.notes:
        console.print(note, markup=False)
    console.print(f"written to {exported.folder}", markup=False)

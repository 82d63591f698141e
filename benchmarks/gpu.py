"""The GPU programme: kernels against the oracle, the optimizer step, whole training steps, and 3B on a 24 GB card.

    python benchmarks/gpu.py --json benchmarks/results/h100.json --table benchmarks/results/h100.md

Made for one GPU with 80 GB and ten minutes: cases that would begin after ``--budget`` seconds are listed as not begun. Every
ratio stands beside its limit; a step that misses its limit is profiled into the JSON. Without a GPU it takes

    TRITON_INTERPRET=1 python benchmarks/gpu.py --shapes smallest --rank 4 --quick

which shows that everything runs, and nothing about speed.
"""

import argparse

import gpu_kernels
import gpu_step
import gpu_training
from gpu_report import Report
from models import SHAPES

PARTS = ("kernels", "step", "training", "capped")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--shapes", default="qwen2.5-1.5b,qwen2.5-3b", help="the last one is the one that is capped")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a training step, of 512 tokens")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--quick", action="store_true", help="two of the kernels' cases, no checkpointing")
    parser.add_argument("--json", help="file for all rows, written after each")
    parser.add_argument("--table", help="file for the table, in Markdown")
    args = parser.parse_args()
    shapes, parts = args.shapes.split(","), args.only.split(",")
    for given, known in ((parts, PARTS), (shapes, SHAPES)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")

    report = Report(args.json, args.budget)
    try:
        run(report, parts, shapes, args)
    finally:
        if args.table:
            report.write_table(args.table)
    wrong = [
        row for row in report.rows if row.note.startswith("failed") or (row.part == "kernels" and row.holds is False)
    ]
    return 1 if wrong else 0


def run(report, parts, shapes, args):
    """Carry the parts out; whatever fails in one of them is a row."""
    if "kernels" in parts:
        gpu_kernels.measure(report, args.quick)
    if "capped" in parts:  # before much of the memory is in pieces
        gpu_training.measure_capped(report, shapes[-1], args.rank)
    if "step" in parts:
        for shape in shapes:
            report.attempt("step", shape, lambda shape=shape: gpu_step.measure(report, shape, args.rank))
    if "training" in parts:
        gpu_training.measure(report, shapes[0], args.rank, args.batch, args.quick)


if __name__ == "__main__":
    raise SystemExit(main())

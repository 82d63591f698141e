"""The GPU programme: kernels against the oracle, the optimizer step, whole training steps, and 3B on a 24 GB card.

    python benchmarks/gpu.py --json benchmarks/results/h100.json --table benchmarks/results/h100.md

Made for one H100 or H200 and five minutes, with torch, Triton, transformers and PEFT alone (``PYTHONPATH=src``, no network).
Every part has its seconds: cases that would begin after them, or after ``--budget``, are listed as not begun. Every ratio stands
beside its limit, and a profile of each optimizer step goes into the JSON, which is written after every row. Without a GPU

    python benchmarks/gpu.py --dry

takes all of it on the smallest shapes in Triton's interpreter, which shows that everything runs, and nothing about speed.
"""

import argparse
import os

import torch

if not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

import gpu_kernels
import gpu_step
import gpu_training
from gpu_report import Report
from models import SHAPES

PARTS = {"kernels": 80, "capped": 35, "step": 60, "training": 60}
"""Seconds in which a part may begin cases. The capped one comes before much of the memory is in pieces."""

DRY = {"shapes": "smallest", "rank": 4, "tokens": "32", "quick": True, "budget": 3600}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--shapes", default="qwen2.5-1.5b,qwen2.5-3b", help="the last one is the one that is capped")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", default="4096,16384", help="of a training step, in sequences of 512")
    parser.add_argument("--budget", type=float, default=280, help="seconds")
    parser.add_argument("--quick", action="store_true", help="few of the kernels' cases")
    parser.add_argument("--dry", action="store_true", help="everything on the smallest shapes")
    parser.add_argument("--json", help="file for all rows, written after each")
    parser.add_argument("--table", help="file for the table, in Markdown")
    args = parser.parse_args()
    if args.dry:
        vars(args).update(DRY)
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
    work = {
        "kernels": lambda: gpu_kernels.measure(report, args.quick),
        "capped": lambda: gpu_training.measure_capped(report, shapes[-1], args.rank),
        "step": lambda: [report.attempt("step", x, lambda x=x: gpu_step.measure(report, x, args.rank)) for x in shapes],
        "training": lambda: gpu_training.measure(report, shapes[0], args.rank, list(map(int, args.tokens.split(",")))),
    }
    for part, seconds in PARTS.items():
        if part in parts:
            report.begin(args.budget if args.dry else seconds)
            work[part]()


if __name__ == "__main__":
    raise SystemExit(main())

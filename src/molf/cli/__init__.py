"""The command line: ``molf COMMAND --setting value ...``, also as ``python -m molf`` and under torchrun.

Only what a command needs is imported, when it runs, so that ``molf --help`` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

import molf
from molf.study.config.run_config import suggestion

COMMANDS: dict[str, str] = {
    "train": "fine-tune a model, leave a plain checkpoint, evaluate it",
    "eval": "evaluate a model on a task",
    "demo": "teach a small pretrained model some facts with MoLF, in minutes on a CPU",
    "compare": "compare methods on a task: a table, a bar chart, and how far they are apart",
    "sweep": "carry out a grid of runs, here or on a SLURM cluster",
    "results": "gather the results of any number of runs in a table, CSV or Parquet",
    "plan": "count parameters and estimate memory without loading weights",
    "report": "show finished runs: tables, and the picture of the routing",
    "export": "write the LoRA experts of a run as one PEFT adapter, or merged into the weights",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0, or 1 when it cannot be carried out, 2 when it is not understood, 75 when it was stopped from outside and can go on
    (``molf.study.faults.preemption.PREEMPTED``).

    Args:
        argv: The command and its arguments; those of the process if left out.
    """
    arguments = _parser().parse_args(argv)
    if arguments.command is None:
        _parser().print_help()
        return 0
    if arguments.command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"molf: unknown command {arguments.command!r}{suggestion(arguments.command, COMMANDS)}", file=sys.stderr)
        print(f"the commands are {known}", file=sys.stderr)
        return 2
    try:
        commands = importlib.import_module("molf.cli.commands")
    except ModuleNotFoundError as error:
        print(f"molf: {error}; install what the commands need: pip install 'molf[train]'", file=sys.stderr)
        return 1
    return int(commands.dispatch(arguments.command, arguments.arguments))


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="molf",
        usage="molf COMMAND [--SETTING VALUE ...]",
        description="Fine-tune language models with an optimizer that routes every layer's update to full fine-tuning or LoRA.",
        epilog=f"commands:\n{listing}\n\n`molf COMMAND --help` shows the settings of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"molf {molf.__version__}")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser

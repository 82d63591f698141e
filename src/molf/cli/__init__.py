"""The command line: ``molf COMMAND --setting value ...``, also as ``python -m molf`` and under torchrun.

Each command imports what it needs when it runs, so that ``molf --help`` answers at once.
"""

import argparse
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import molf
from molf.errors import MolfError, UsageError, visible
from molf.study.config.run_config import suggestion
from molf.study.faults.preemption import PREEMPTED, Preempted

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("commands.train", "fine-tune a model, leave a plain checkpoint, evaluate it"),
    "eval": ("commands.evaluate", "evaluate a model on a task"),
    "demo": ("commands.demo", "teach a small pretrained model some facts with MoLF, in minutes on a CPU"),
    "doctor": ("doctor.doctor", "show versions, the device, which kernels take steps and why, and what is missing"),
    "compare": ("compare.compare", "compare methods on a task: a table, a bar chart, and the differences"),
    "sweep": ("sweep.sweep", "run a grid of settings, here or on a SLURM cluster"),
    "results": ("finished.results", "gather the results of any number of runs in a table, CSV or Parquet"),
    "plan": ("commands.plan", "count parameters and estimate memory without loading weights"),
    "report": ("finished.report", "show finished runs: tables and routing pictures"),
    "recipe": ("recipe.recipe", "turn the routing of a run into a static allocation within a budget of parameters"),
    "export": ("finished.export", "write the LoRA experts of a run as one PEFT adapter, or merged into the weights"),
}
"""Command -> its function in this package, and its purpose."""
TRACEBACK_FLAG = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0; 1 if the command fails; 2 if the command line is wrong; 75 if the run was stopped by a signal and can resume
    (``molf.study.faults.preemption.PREEMPTED``).

    Args:
        argv: The command and its arguments; ``sys.argv`` by default. ``--traceback`` anywhere, or ``MOLF_TRACEBACK=1`` in the
            environment, shows the traceback of errors that are otherwise one line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text, nor terminals UTF-8
    given = list(sys.argv[1:] if argv is None else argv)
    show_traceback = TRACEBACK_FLAG in given or os.environ.get("MOLF_TRACEBACK", "0") not in ("", "0")
    arguments = _parser().parse_args([argument for argument in given if argument != TRACEBACK_FLAG])
    if arguments.command is None:
        _parser().print_help()
        return 0
    if arguments.command not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"molf: unknown command {arguments.command!r}{suggestion(arguments.command, COMMANDS)}", file=sys.stderr)
        print(f"the commands are {known}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[arguments.command][0].partition(".")

    def command(argv: list[str]) -> None:
        getattr(importlib.import_module(f"molf.cli.{module}"), function)(argv)

    return _call(arguments.command, command, arguments.arguments, show_traceback)


def _call(name: str, command: Callable[[list[str]], None], argv: list[str], show_traceback: bool) -> int:
    """Run a command. A user's mistake becomes one line on stderr; any other error keeps its traceback."""
    # At import it warns about a kernel that matters only for 4-bit weights on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        command(argv)
    except ModuleNotFoundError as error:
        if show_traceback or (error.name or "").partition(".")[0] == "molf":
            raise
        print(f"molf {name}: {error}; install what the commands need: pip install 'molf[train]'", file=sys.stderr)
        return 1
    except MolfError as error:
        if show_traceback:
            traceback.print_exception(error)
        hint = " (--traceback shows the cause)" if error.__cause__ is not None and not show_traceback else ""
        print(visible(f"molf {name}: {error}{hint}"), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Preempted as stopped:
        print(f"molf {name}: {stopped.message}", file=sys.stderr)
        return PREEMPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="molf",
        usage="molf COMMAND [--SETTING VALUE ...]",
        description="Fine-tune language models with an optimizer that routes every layer's update to full fine-tuning or LoRA.",
        epilog=f"commands:\n{listing}\n\n`molf COMMAND --help` shows the settings of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"molf {molf.__version__}")
    parser.add_argument(TRACEBACK_FLAG, action="store_true", help="show the traceback of every error")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser

"""The commands: parse, call, print."""

import argparse
import logging
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.text import Text

from molf.cli.compare import compare
from molf.cli.export import export
from molf.cli.parsing import parse_run, print_help
from molf.cli.plan import plan
from molf.cli.results import results
from molf.cli.sweep import sweep
from molf.errors import UsageError
from molf.study.config.run_config import RunConfig
from molf.study.faults.preemption import PREEMPTED, Preempted

if TYPE_CHECKING:
    from molf.study.results.result import Result
    from molf.study.run.dry_run import Plan


def dispatch(command: str, argv: Sequence[str]) -> int:
    """Run a command; what the user can put right is told in one line instead of a traceback.

    Args:
        command: A name of ``COMMANDS``.
        argv: Its arguments.
    """
    # At its import it warns of a kernel that only 4-bit weights on a CPU would be faster with.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        COMMANDS[command](list(argv))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if not _is_ours(error):
            raise
        _complain(command, str(error))
        return 2 if isinstance(error, UsageError) else 1
    except Preempted as stopped:
        _complain(command, stopped.message)
        return PREEMPTED
    return 0


def _complain(command: str, message: str) -> None:
    text = Text.assemble((f"molf {command}", "bold"), f": {message}")
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def _is_ours(error: BaseException) -> bool:
    """Say whether this package raised an error, to tell the user something, or code that it called failed."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")).startswith("molf.")


def train(argv: list[str]) -> None:
    """``molf train``."""
    if _wants_help(argv):
        return print_help("train")
    _carry_out(parse_run(argv))


def evaluate(argv: list[str]) -> None:
    """``molf eval``: a run that does not train."""
    if _wants_help(argv):
        return print_help("eval")
    _carry_out(parse_run(argv, preset={"only_eval": True}))


def demo(argv: list[str]) -> None:
    """``molf demo``: a training run with a preset, which flags may change."""
    from molf.study.config.presets import DEMO

    if _wants_help(argv):
        return print_help("demo")
    config = parse_run(argv, preset=DEMO)
    _console().print(
        f"MoLF teaches {config.model.model_name_or_path} facts that are not true, so that what it learns is new to it.\n"
        f"It evaluates, trains and evaluates again: some minutes on a CPU. Everything is written to {config.output_dir}."
    )
    _carry_out(config)


def report(argv: list[str]) -> None:
    """``molf report``: tables of finished runs, and the routing pictures drawn anew."""
    from molf.study.results.check import check_predictions
    from molf.study.results.result import read_result
    from molf.study.results.routing import ROUTING_FILE, read_routing
    from molf.study.results.tables import draw_routing, metrics_table, runs_table

    parser = argparse.ArgumentParser(prog="molf report", description="Show finished runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--check", action="store_true", help="compute the metrics anew from the predictions as well")
    args = parser.parse_args(argv)
    folders = args.runs
    results = {str(folder): read_result(folder) for folder in folders}
    console = _console()
    for folder, result in zip(folders, results.values(), strict=True):
        console.print(metrics_table(result))
        if args.check:
            check_predictions(folder, result)
            console.print("computed anew from the predictions: the same metrics")
        if (folder / ROUTING_FILE).is_file():
            picture = folder / "routing.png"
            draw_routing(read_routing(folder / ROUTING_FILE), picture, title=str(result.config["run_name"]))
            console.print(f"routing: {picture}")
    if len(results) > 1:
        console.print(runs_table(results))


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": train,
    "eval": evaluate,
    "demo": demo,
    "compare": compare,
    "sweep": sweep,
    "results": results,
    "plan": plan,
    "report": report,
    "export": export,
}


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _console() -> Console:
    """Return where to print: nowhere on all but the first process of a distributed run."""
    return Console(quiet=os.environ.get("RANK", "0") != "0", soft_wrap=True)


def _carry_out(config: RunConfig) -> None:
    console = _console()
    if config.output.dry_run:
        from molf.study.run.dry_run import make_plan

        return _show_plan(console, make_plan(config))
    from molf.study.run.train import run

    result = run(config)
    if result is not None:
        _show_result(console, result)


def _show_result(console: Console, result: "Result") -> None:
    from molf.study.results.tables import metrics_table

    console.print(metrics_table(result))
    if result.training is not None:
        training = result.training
        speed = f", {training.tokens_per_second:.0f} tokens/s" if training.tokens_per_second else ""
        console.print(f"{training.steps} steps in {training.seconds:.1f} s{speed}, mean loss {training.loss:.4f}")
    if result.routing is not None:
        shares = ", ".join(f"{expert} {share:.1%}" for expert, share in result.routing.items())
        console.print(f"updates won: {shares}")
    folder = Path(result.config["output_dir"])
    console.print(f"written to {folder}:", ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))


def _show_plan(console: Console, plan: "Plan") -> None:
    from molf.study.sizing.report import memory_table, parameters_table

    console.rule("settings")
    console.print(
        yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True).strip(), markup=False, highlight=False
    )
    console.rule("first example (green: in the loss)")
    pieces = [(text, "bold green" if in_loss else "dim") for text, in_loss in plan.example]
    console.print(Text.assemble(*pieces))
    console.rule("size")
    console.print(parameters_table(plan.needs))
    console.print(memory_table(plan.needs))
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    console.print(f"dry run: nothing was trained; {plan.rows[0]} rows to train on, {plan.rows[1]} to evaluate on")

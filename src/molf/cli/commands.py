"""The commands about runs to come: ``molf train``, ``eval``, ``demo`` and ``plan``."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from molf.cli.parsing import parse_run, print_help
from molf.cli.show import console, show_plan, show_result, write_page
from molf.errors import UsageError
from molf.study.config.run_config import DEMO, OutputConfig, RunConfig

if TYPE_CHECKING:
    from molf.study.results.result import Result


def train(argv: list[str]) -> None:
    """``molf train``."""
    _parse_and_run("train", argv)


def evaluate(argv: list[str]) -> None:
    """``molf eval``: a run that does not train."""
    _parse_and_run("eval", argv, lambda argv: parse_run(argv, {"only_eval": True}))


def demo(argv: list[str]) -> None:
    """``molf demo``: a small training run, whose settings flags may change, and its page."""

    def announce(config: RunConfig) -> None:
        console().print(
            f"MoLF teaches {config.model.model_name_or_path} counterfactual facts, which no model knows beforehand.\n"
            f"It evaluates, trains and evaluates again: minutes on a CPU. All files go to {config.output_dir}; routing.png, "
            "the picture of what won where, is there once the training ends."
        )

    if (result := _parse_and_run("demo", argv, _parse_demo, announce)) is not None:
        folder = Path(result.config["output_dir"])
        write_page([folder], folder / "report.html")


def plan(argv: list[str]) -> None:
    """``molf plan``: count parameters, estimate memory, and warn if it does not fit."""
    parser = argparse.ArgumentParser(prog="molf plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--memory_gb", "--memory-gb", type=float, metavar="GIB")
    if _wants_help(argv):
        console().print("--memory_gb GIB: memory of the device to plan for; of the visible accelerator by default\n")
        return print_help("plan")
    given, rest = parser.parse_known_args(argv)
    if given.memory_gb is not None and not 0 < given.memory_gb < math.inf:
        raise UsageError(f"memory_gb={given.memory_gb} must be a finite number above 0")
    config = parse_run(rest)

    from molf.study.sizing.blueprint import Blueprint
    from molf.study.sizing.memory import available_memory, estimate
    from molf.study.sizing.report import memory_table, parameters_table, verdict

    available = available_memory() if given.memory_gb is None else int(given.memory_gb * 2**30)
    needs = estimate(Blueprint(config), accelerator=available is not None)
    for table in (parameters_table(needs), memory_table(needs)):
        console().print(table)
    said = verdict(needs, available)
    console().print(said, style="yellow" if said.startswith("warning") else "")


def _parse_demo(argv: list[str]) -> RunConfig:
    """Return the settings of a demo. It replaces an earlier demo in its own folder, but no run in one that the user chose."""
    own = ("output_dir", "overwrite")
    config = parse_run(argv, {name: value for name, value in DEMO.items() if name not in own})
    chosen = config.train.get("output_dir") or config.train.get("run_name")
    if chosen or config.output.output_root != OutputConfig.output_root:
        return config
    return parse_run(argv, DEMO)


def _wants_help(argv: Sequence[str]) -> bool:
    return "--help" in argv or "-h" in argv


def _parse_and_run(
    command: str,
    argv: list[str],
    parse: Callable[[list[str]], RunConfig] = parse_run,
    announce: Callable[[RunConfig], None] = lambda config: None,
) -> "Result | None":
    """Return the result of the run; None if there was none, as on all ranks but 0."""
    if _wants_help(argv):
        print_help(command)
        return None
    config = parse(argv)
    announce(config)
    if config.output.dry_run:
        from molf.study.run.dry_run import make_plan

        show_plan(make_plan(config))
        return None
    from molf.study.run.train import run

    if (result := run(config)) is not None:
        show_result(result)
    return result

"""``molf plan``: parameters and memory of a run, without its weights."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from molf.cli.parsing import parse_run, print_help


def plan(argv: Sequence[str]) -> None:
    """Carry out ``molf plan``: count, estimate, and warn where it does not fit."""
    parser = argparse.ArgumentParser(prog="molf plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--memory_gb", "--memory-gb", type=float, metavar="GIB")
    if "--help" in argv or "-h" in argv:
        print("--memory_gb GIB: memory of the device to plan for; the visible accelerator's if left out\n")
        return print_help("plan")
    given, rest = parser.parse_known_args(argv)
    config = parse_run(rest)

    from molf.study.sizing.blueprint import Blueprint
    from molf.study.sizing.memory import available_memory, estimate
    from molf.study.sizing.report import memory_table, parameters_table, verdict

    available = available_memory() if given.memory_gb is None else int(given.memory_gb * 2**30)
    needs = estimate(Blueprint(config), accelerator=available is not None)
    console = Console(soft_wrap=True, highlight=False)
    console.print(parameters_table(needs))
    console.print(memory_table(needs))
    said = verdict(needs, available)
    console.print(Text(said, style="yellow" if said.startswith("warning") else ""))

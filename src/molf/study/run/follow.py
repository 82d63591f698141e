"""A table of a run's routing in the terminal, which is drawn again while the run goes on."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from molf.integrations.routing_lines import find_log
from molf.study.faults.run_lock import in_use
from molf.study.results.result import RESULT_FILE
from molf.study.results.routing import RoutingSummary, depth_of, in_order, kind_of
from molf.study.results.routing_reader import RoutingReader

INTERVAL = 1.0  # seconds
MAX_CELLS = 100_000
_WIDEST = 48  # characters for depths; more depths share them
_LATE = 0.1  # share of the steps that are the last ones
_BLOCKS = "▁▂▃▄▅▆▇█"


def follow(run: Path, console: Console, pause: Callable[[float], None] = time.sleep) -> None:
    """Show the routing of a run until it is finished, or until Ctrl-C.

    Nothing of the run needs to exist yet. Only what is new in its log is read, and memory does not grow with the steps.

    Args:
        run: The folder of the run.
        console: Where to draw; what is no terminal gets the last table only.
        pause: Waits for some seconds.

    Raises:
        MolfError: The log is damaged.
    """
    reader = None
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                finished = (run / RESULT_FILE).is_file()  # before the log is read: a run writes its result last
                log = find_log(run)
                if log is not None and (reader is None or reader.path != log):
                    reader = RoutingReader(log, MAX_CELLS)
                if reader is not None:
                    reader.poll()
                summary = None if reader is None else reader.summary()
                live.update(routing_table(summary, str(run), _state(run, finished)), refresh=True)
                if finished:
                    return
                pause(INTERVAL)
        except KeyboardInterrupt:  # how the user leaves
            return


def _state(run: Path, finished: bool) -> str:
    if finished:
        return "finished"
    return "running" if in_use(run) else "no run of molf works there now"


def routing_table(summary: RoutingSummary | None, title: str, state: str) -> Group | Text:
    """Return who won, by kind of projection: over all steps, over the last tenth of them, and at every depth.

    Args:
        summary: The routing so far; None if no step was logged.
        title: What to write above.
        state: What the run is doing.
    """
    if summary is None:
        return _text(f"{title}: {state}; no decision is logged yet")
    table = Table(box=box.SIMPLE)
    shown = summary.bins.experts[0]
    table.add_column("projection")
    for expert in summary.bins.experts:
        table.add_column(_text(expert), justify="right")
    table.add_column(_text(f"{shown} lately"), justify="right")
    table.add_column(_text(f"{shown} by depth"), no_wrap=True)
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(summary.bins.modules):
        kinds[kind_of(name)].append(number)
    for kind, members in kinds.items():
        _add_row(table, kind, summary, members)
    if len(kinds) > 1:
        _add_row(table, "all", summary, list(range(len(summary.bins.modules))))
    last = summary.bins.spans[-1][1]
    return Group(_text(title), table, _text(f"{state}; {summary.steps} logged steps, the last one is {last}"))


def _text(name: str) -> Text:
    """Return a name without markup and without the control characters that would move the cursor."""
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name))


def _add_row(table: Table, label: str, summary: RoutingSummary, members: list[int]) -> None:
    names = [summary.bins.modules[number] for number in members]
    experts = summary.bins.experts
    shares = [float(np.mean([summary.by_module[name][expert] for name in names])) for expert in experts]
    late = summary.bins.shares[-max(1, round(_LATE * len(summary.bins.spans))) :, members, 0]
    lately = "-" if np.isnan(late).all() else f"{np.nanmean(late):.0%}"
    cells = [label, *(f"{share:.0%}" for share in shares), lately, _by_depth(summary, names)]
    table.add_row(*map(_text, cells))


def _by_depth(summary: RoutingSummary, names: list[str]) -> str:
    """Return a block for each depth, the higher the more the first expert won there; neighbours share one if there are many."""
    shares: dict[str, list[float]] = defaultdict(list)
    for name in names:
        shares[depth_of(name)].append(summary.by_module[name][summary.bins.experts[0]])
    means = [float(np.mean(shares[depth])) for depth in in_order(shares)]
    size = -(-len(means) // _WIDEST)
    chunks = [means[first : first + size] for first in range(0, len(means), size)]
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int(np.mean(chunk) * len(_BLOCKS)))] for chunk in chunks)

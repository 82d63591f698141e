"""What commands print: the outcome of a run, and what a dry run found out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from molf.study.results.result import Result
    from molf.study.run.dry_run import Plan


def console() -> Console:
    """Return a console that prints text as it is, as names and settings of users are not markup. Only rank 0 prints."""
    quiet = os.environ.get("RANK", "0") != "0"
    return Console(quiet=quiet, soft_wrap=True, highlight=False, markup=False, emoji=False)


def show_result(result: "Result") -> None:
    """Print the metrics of a run, what its training took, and where its files are."""
    from molf.study.results.tables import metrics_table

    out = console()
    out.print(metrics_table(result))
    if (training := result.training) is not None:
        speed = f", {training.tokens_per_second:.0f} tokens/s" if training.tokens_per_second else ""
        out.print(f"{training.steps} steps in {training.seconds:.1f} s{speed}, mean loss {training.loss:.4f}")
    if result.routing is not None:
        out.print("updates won: " + ", ".join(f"{expert} {share:.1%}" for expert, share in result.routing.items()))
    if (kept := result.retention) is not None:
        moved = "" if kept.kl is None else f"; KL from the base model {kept.kl}"
        out.print(
            f"forgetting, in nats a token: loss on other text {kept.loss_before.value:.2f} -> {kept.loss_after.value:.2f}, "
            f"rise {kept.loss_rise}{moved} ({kept.origin}; took {kept.seconds:.1f} s)"
        )
    folder = Path(result.config["output_dir"])
    out.print(f"written to {folder}: " + ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page about finished runs, and print where it is."""
    from molf.study.report import page

    page.write_page(folders, path)
    console().print(f"page: {path}")


def show_plan(plan: "Plan") -> None:
    """Print the settings of a dry run, its first example, its size, and what looks wrong."""
    from molf.study.sizing.report import memory_table, parameters_table

    out = console()
    out.rule("settings")
    out.print(yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True).strip())
    if plan.needs is None:
        return out.print(f"dry run: nothing was evaluated; {plan.rows[1]} evaluation rows")
    out.rule("first example (green: in the loss)")
    out.print(Text.assemble(*((text, "bold green" if in_loss else "dim") for text, in_loss in plan.example)))
    out.rule("size")
    out.print(parameters_table(plan.needs))
    out.print(memory_table(plan.needs))
    for warning in plan.warnings:
        out.print(f"warning: {warning}", style="yellow")
    held_out = f", {plan.held_out} rows held out for validation" if plan.held_out else ""
    out.print(f"dry run: nothing was trained; {plan.rows[0]} training rows, {plan.rows[1]} evaluation rows{held_out}")

"""``molf recipe``: a static allocation from the routing of a run or of a probe."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from molf.cli.parsing import parse_run, user_path
from molf.cli.show import console
from molf.errors import UsageError


def recipe(argv: Sequence[str]) -> None:
    """``molf recipe``: which layers train whole, and which by LoRA of which rank, within a budget."""
    from molf.study.run.allocation import Rule

    parser = argparse.ArgumentParser(
        prog="molf recipe",
        usage="molf recipe RUN [--budget 10%%] [--allocation RULE]\n"
        "       molf recipe --probe_steps N --output_dir DIR [--SETTING VALUE ...]",
        description="Turn the routing of a run into a static allocation for `molf train --recipe`, PEFT and axolotl. "
        "On one task it was level with a random one (docs/recipes.md): take it as a diagnostic.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--probe_steps", "--probe-steps", type=int, metavar="N", help="train a fresh model for N steps instead"
    )
    parser.add_argument(
        "--budget", default="10%", help="trainable parameters: a number, or a share of the model's (default: 10%%)"
    )
    parser.add_argument(
        "--allocation",
        choices=get_args(Rule),
        default="routing",
        help="by the routing; or what it has to beat at the same budget: the same evidence shuffled among layers, its mean over "
        "each kind of projection, one rank for all, or EVA's ranks (default: %(default)s)",
    )
    parser.add_argument("--draw", type=int, default=0, help="seed of --allocation random and of ties (default: 0)")
    parser.add_argument(
        "--output_dir", "--output-dir", type=user_path, help="where to write (default: RUN/recipe-ALLOCATION)"
    )
    # Settings of a probe may have several values, which a positional argument of the parser would take.
    run = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    given, rest = parser.parse_known_args(argv[run is not None :])
    if (run is None) is (given.probe_steps is None):
        raise UsageError("give either the folder of a run first, or --probe_steps N and the settings of a run")
    if run is not None and rest:
        raise UsageError(f"unexpected {rest[0]!r}; settings of a run are for --probe_steps")
    if run is None and given.output_dir is None:
        raise UsageError("--probe_steps keeps no run: give --output_dir, where to write the recipe")
    label = given.allocation + (f"-{given.draw}" if given.allocation == "random" else "")

    from molf.study.methods.recipe_file import AXOLOTL_FILE, PEFT_FILE, PEFT_FOLDER, RECIPE_FILE
    from molf.study.results.result import folder_of
    from molf.study.run.recipes import Request, recipe_from_probe, recipe_from_run

    request = Request(given.budget, given.allocation, given.draw)
    if run is None:
        folder = given.output_dir
        made = recipe_from_probe(parse_run(rest), given.probe_steps, request, folder)
    else:
        folder = given.output_dir or folder_of(run) / f"recipe-{label}"
        made = recipe_from_run(run, request, folder)
    out, ranks = console(), made.ranks.values()
    out.print(
        f"{made.allocation}, from {made.source}: {made.trainable:,} parameters train, of a budget of {made.budget:,}"
    )
    by_lora = f"{len(ranks)} by LoRA of rank {min(ranks)} to {max(ranks)}" if ranks else "none by LoRA"
    out.print(f"{len(made.whole)} layers whole, {by_lora}")
    out.print(f"train with: molf train --recipe {shlex.quote(str(folder / RECIPE_FILE))} --model_name_or_path ...")
    for library, file in (("PEFT", folder / PEFT_FOLDER / PEFT_FILE), ("axolotl", folder / AXOLOTL_FILE)):
        out.print(f"for {library}: {file if file.is_file() else 'no file, as it cannot train this'}")

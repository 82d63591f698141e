"""The file of a static allocation, and the same for PEFT and axolotl."""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from molf.errors import MolfError
from molf.files import atomic_write, typed, write_errors

RECIPE_FILE = "recipe.yaml"
PEFT_FOLDER = "peft"
PEFT_FILE = "adapter_config.json"
AXOLOTL_FILE = "axolotl.yaml"
SCALE = 2.0
"""Scale of every LoRA, ``alpha / r``, whatever its rank: that of the published LoRA baseline."""


@dataclass(frozen=True)
class RecipeFile:
    """What the file of a static allocation holds.

    Attributes:
        allocation: The rule that made it.
        source: What it was made from.
        budget: Parameters that may train.
        trainable: Parameters that train.
        whole: Layers that train whole.
        ranks: Ranks of the layers that train by LoRA.
    """

    allocation: str
    source: str
    budget: int
    trainable: int
    whole: list[str]
    ranks: dict[str, int]


def lora_arguments(ranks: Mapping[str, int], dropout: float) -> dict[str, Any]:
    """Return the arguments of ``peft.LoraConfig`` for layers by their full names; ``^`` makes PEFT match nothing else."""
    usual = max(ranks.values())
    return {
        "r": usual,
        "lora_alpha": SCALE * usual,
        "rank_pattern": {f"^{re.escape(name)}": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{re.escape(name)}": SCALE * rank for name, rank in ranks.items()},
        "target_modules": list(ranks),
        "exclude_modules": None,
        "lora_dropout": dropout,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def read_recipe(path: Path) -> RecipeFile:
    """Read the file of a static allocation.

    Raises:
        MolfError: There is no such file, or it is damaged.
    """
    if path.is_dir():
        raise MolfError(f"recipe={path} is a folder: give its {RECIPE_FILE}, {path / RECIPE_FILE}")
    if not path.is_file():
        raise MolfError(
            f"there is no recipe {path}; write one with `molf recipe RUN`, or choose the settings of molf by "
            "--recipe default or published"
        )
    try:
        found: RecipeFile = typed(RecipeFile, yaml.safe_load(path.read_text(encoding="utf-8")))
        if bad := [name for name in found.whole if not isinstance(name, str) or name in found.ranks]:
            raise MolfError(f"{bad[0]!r} in whole is no name, or in ranks too")
        if low := [name for name, rank in found.ranks.items() if rank < 1]:
            raise MolfError(f"the rank of {low[0]} is below 1")
        if not found.whole and not found.ranks:
            raise MolfError("no layer trains")
    except (MolfError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise MolfError(
            f"{path} is not a recipe: {str(error).splitlines()[0]}; write it again with `molf recipe`"
        ) from error
    return found


def check_recipe_folder(folder: Path) -> None:
    """Refuse a folder with files of the user of the names that a recipe writes or removes.

    Raises:
        MolfError: There are such files, and no recipe beside them; they are named.
    """
    found = [name for name in (RECIPE_FILE, AXOLOTL_FILE, f"{PEFT_FOLDER}/{PEFT_FILE}") if (folder / name).exists()]
    try:
        if found:
            read_recipe(folder / RECIPE_FILE)
    except MolfError as error:
        raise MolfError(
            f"{folder} holds {', '.join(found)}, which no recipe wrote and this one would replace; choose another --output_dir"
        ) from error


def write_recipe(folder: Path, recipe: RecipeFile, parameters: Iterable[str]) -> None:
    """Write ``recipe.yaml`` for ``molf train --recipe``, a PEFT configuration, and ``unfrozen_parameters`` for axolotl.

    PEFT's ``modules_to_save`` trains the whole layers, as copies; stacks of experts, which are no modules, it cannot train.
    Without whole layers there is no file for axolotl, which takes an empty list as "train everything". What an earlier recipe
    left in the folder is removed.

    Args:
        folder: Where to write.
        recipe: The recipe.
        parameters: Names of the model's parameters.

    Raises:
        MolfError: The folder holds files of the user by these names, or cannot be written.
    """
    check_recipe_folder(folder)
    _write(folder / RECIPE_FILE, _yaml(asdict(recipe), "Train with: molf train --recipe FILE --model_name_or_path ..."))
    names = set(parameters)
    stacks = [name for name in recipe.whole if name in names]
    peft, axolotl = folder / PEFT_FOLDER / PEFT_FILE, folder / AXOLOTL_FILE
    for stale in (peft, axolotl):
        with write_errors(stale):
            stale.unlink(missing_ok=True)
    if recipe.ranks and not stacks:
        arguments = lora_arguments(recipe.ranks, dropout=0.0)
        config = LoraConfig(**arguments, modules_to_save=recipe.whole or None)
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            _write(peft, _indented(Path(scratch) / PEFT_FILE))
    if not recipe.whole:
        return
    whole = [name for name in names if name in stacks or name.rpartition(".")[0] in recipe.whole]
    patterns = [f"^{re.escape(name)}$" for name in sorted(whole)]
    note = "The whole layers of a recipe, for axolotl without an adapter: everything else stays frozen."
    _write(axolotl, _yaml({"unfrozen_parameters": patterns}, note))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _yaml(value: Mapping[str, Any], note: str) -> str:
    return f"# {note}\n" + yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=200)


def _indented(path: Path) -> str:
    return json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2) + "\n"

"""The house: rooms stand on floors, and imports go down only.

Every file below ``src/molf`` belongs to a room, every room lists the rooms it may import, and no files import each other in a
circle. Imports inside functions and under ``TYPE_CHECKING`` count: what is named there is used there.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import molf

SOURCE = Path(molf.__file__).parent
# From the ground up. A room may import those of its own row and itself; the basis is open to all.
BASIS = {"errors", "files"}
CORE = {"scores", "routing", "numerics", "layers", "setup", "kernels", "optimizer"}
LIBRARY = CORE | {"integrations", "tasks"}
STUDY = ["config", "engine", "methods", "results", "report", "faults", "sizing", "run", "grids"]
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "scores": set(),
    "routing": set(),
    "numerics": {"scores"},
    "layers": {"numerics"},
    "setup": {"numerics", "layers"},
    "kernels": {"scores", "routing", "numerics", "layers"},
    "optimizer": CORE,
    "reference": {"setup"},
    "integrations": CORE,
    "tasks": set(),
    **{f"study.{room}": LIBRARY | {f"study.{below}" for below in STUDY[:i]} for i, room in enumerate(STUDY)},
    "study.torchrun": {"study.faults"},
    "study.doctor": CORE | {"integrations", "study.results"},
    "cli": {f"study.{room}" for room in [*STUDY, "doctor"]},
}
ROOMS["study.config"] = set()  # every flag must be known without torch
# The package's faces: lazily imported public names.
FACES = {"molf", "molf.__main__", "molf.study"}
# The optimizer installs with torch alone. What an adapter or a run needs comes with the `train` extra.
TORCH_ALONE = {
    "errors",
    "files",
    "scores",
    "routing",
    "reference",
    "numerics",
    "layers",
    "setup",
    "kernels",
    "optimizer",
}


def name_of(path, source=SOURCE):
    return ".".join(("molf", *path.relative_to(source).with_suffix("").parts)).removesuffix(".__init__")


def room_of(module):
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[0] == "study" else parts[:1])


def imported(path, modules):
    """Yield the modules of ours that a file imports, and the top names of all others."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in names]
        else:
            continue
        yield from names


FILES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
EDGES = {name: {x for x in imported(path, FILES) if x in FILES and x != name} for name, path in FILES.items()}


def broken(edges):
    """Return the imports that no rule allows, as ``module > imported``."""
    return [
        f"{module} > {target}"
        for module, targets in sorted(edges.items())
        for target in sorted(targets)
        if module not in FACES and target not in FACES
        if room_of(target) not in ROOMS[room_of(module)] | BASIS | {room_of(module)}
    ]


def circle(edges):
    """Return files that import each other in a circle, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        found = next((found for target in sorted(edges[module]) if (found := visit(target))), None)
        path.pop()
        done.add(module)
        return found

    return next((found for module in sorted(edges) if (found := visit(module))), None)


def test_every_file_has_a_room():
    assert {room_of(module) for module in FILES if module not in FACES} <= ROOMS.keys()


def test_nobody_imports_upward():
    assert not broken(EDGES)


@pytest.mark.parametrize("module", ["molf", "molf.study.config.run_config", "molf.study.grids.attempt"])
def test_what_only_starts_or_describes_runs_loads_nothing_heavy(module):
    """A scheduler's job imports the attempt and waits: seconds of a start, and half a gigabyte, for each run."""
    heavy = "{'torch', 'transformers', 'trl', 'pandas', 'datasets'}"
    subprocess.run([sys.executable, "-c", f"import sys, {module}; assert not {heavy} & set(sys.modules)"], check=True)


def test_no_circle():
    assert circle(EDGES) is None


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("molf.numerics.adamw", "molf.layers.base"),
        ("molf.kernels.step", "molf.optimizer.step"),
        ("molf.tasks.fact", "molf.study.config.run_config"),
        ("molf.study.engine.evaluate", "molf.study.run.train"),
        ("molf.study.run.train", "molf.cli.commands"),
        ("molf.integrations.trainer", "molf.tasks.base"),
    ],
)
def test_an_import_upward_is_found(module, target):
    assert broken({module: {target}}) == [f"{module} > {target}"]


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_core_needs_torch_alone():
    for module, path in FILES.items():
        if module not in FACES and room_of(module) in TORCH_ALONE:
            tops = {name.split(".")[0] for name in imported(path, FILES)}
            heavy = {
                "transformers",
                "trl",
                "peft",
                "datasets",
                "accelerate",
                "safetensors",
                "rich",
                "matplotlib",
                "numpy",
            }
            assert not heavy & tops, module

"""The import direction: core and tasks know nobody, integrations know the core, study knows all three, cli calls study."""

import ast
from pathlib import Path

import pytest

import molf

SOURCE = Path(molf.__file__).parent
# The places each place may import from (itself is understood).
ALLOWED = {
    "core": set(),
    "tasks": set(),
    "integrations": {"core"},
    "study": {"core", "integrations", "tasks"},
    "cli": {"study"},
}
# Bare names of the package at large: its version, and the lazily imported public names in `molf/__init__.py`.
ENTRY_POINTS = {"__init__.py", "__main__.py"}


def place(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "core"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("molf."):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("molf."))


FILES = [p for p in sorted(SOURCE.rglob("*.py")) if str(p.relative_to(SOURCE)) not in ENTRY_POINTS]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nobody_imports_upward(path):
    own = place("molf." + ".".join(path.relative_to(SOURCE).with_suffix("").parts))
    reached = {place(module) for module in imports(path)}
    assert reached <= ALLOWED[own] | {own}


def test_core_needs_torch_alone():
    core = [p for p in FILES if p.parent == SOURCE]
    heavy = {"transformers", "trl", "peft", "datasets", "accelerate", "safetensors", "rich", "matplotlib", "numpy"}
    for path in core:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not heavy & {name.split(".")[0] for name in names}, path

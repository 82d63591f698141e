"""The interpreter accepts much that a GPU does not, so all kernels are also compiled for one. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="Triton brings no ptxas for this platform")
SCRIPT = Path(__file__).parents[1] / "compiling.py"
KERNELS = {"_grad_A", "_grad_B", "_merged_update", "_moments", "_requantize", "_score_quantized", "_totals", "_winners"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_an_h100(compiled):
    assert {name.partition("(")[0] for name in compiled} == KERNELS


def test_registers_and_shared_memory_suffice(compiled):
    """Nothing spills from the 255 registers of a thread; programs fit the 65536 registers and 227 KiB of a multiprocessor."""
    for name, made in compiled.items():
        assert made["stack"] <= 64, name
        assert made["registers"] * made["warps"] * 32 <= 65536 and made["shared"] <= 227 * 1024, name


def test_aligned_tensors_are_read_several_words_at_once(compiled):
    vectors = {name: made["vectors"] for name, made in compiled.items() if "ALIGNED=True" in name}
    assert {name.partition("(")[0] for name in vectors} == KERNELS - {"_totals"} and all(vectors.values())


def test_tensor_cores_get_rounded_factors(compiled):
    names = [name for name in compiled if name.startswith(("_merged_update", "_grad")) and "R=0" not in name]
    assert len(names) > 4 and all(compiled[name]["roundings"] >= 8 for name in names)

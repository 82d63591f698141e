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
KERNELS = {"move_pairs", "move_winners", "requantize", "score_quantized", "sum_per_expert", "update_moments"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def vectorized(compiled):
    """The kernels for tensors that are read several elements at once."""
    return {
        name: made
        for name, made in compiled.items()
        if "HINT=" in name and "HINT=1," not in name and "HINT=1)" not in name
    }


def test_every_kernel_compiles_for_an_h100(compiled):
    assert {name.partition("(")[0] for name in compiled} == KERNELS
    assert {name.partition("(")[0] for name in vectorized(compiled)} == KERNELS - {"sum_per_expert"}


def test_a_decoder_at_any_rank_runs_the_kernels_that_read_vectors(compiled):
    """All of them, with every kind of moments and weights: what is asked of these below holds at rank 128, too."""
    own = {name for name, made in compiled.items() if "block" in made["models"]}
    assert own - set(vectorized(compiled)) == {"sum_per_expert()"}
    assert {name.partition("(")[0] for name in own} == KERNELS


def test_nothing_spills_and_a_multiprocessor_holds_two_blocks(compiled):
    """Of its 65536 registers and 227 KiB of memory; kernels for odd sizes may need more, because they are rare."""
    for name, made in compiled.items():
        blocks = 2 if name in vectorized(compiled) else 1
        assert made["stack"] == 0, name
        assert blocks * made["registers"] * made["warps"] * 32 <= 65536, name
        assert blocks * made["shared"] <= 227 * 1024, name


def test_elements_are_moved_16_bytes_at_once(compiled):
    """Single words are loads of tables and scalars: a few, whatever the number of elements."""
    for name, made in vectorized(compiled).items():
        if name.startswith(("move", "update")):
            assert made["widths"]["16"] >= 6 and made["widths"].get("2", 0) == 0, name
            assert made["widths"]["4"] <= 10, name
        else:  # of a thread's 16 elements, two codes each are looked up one by one; in ``requantize`` those to write, too
            lookups = 32 * (1 + name.startswith("requantize"))
            assert made["widths"]["16"] >= 4 and made["widths"].get("2", 0) == 0, name
            assert made["widths"]["4"] <= lookups + 15 and made["widths"].get("1", 0) <= lookups - 32, name


def test_instructions_stay_few(compiled):
    """Of all widths, in PTX; 64-bit divisions of single elements, and random numbers in 64 bits, would show."""
    limits = {"move_pairs": 400, "move_winners": 400, "update_moments": 400, "requantize": 2000, "score_quantized": 900}
    for name, made in vectorized(compiled).items():
        kernel = name.partition("(")[0]
        noise = (500 if kernel == "move_winners" else 1200) * ("STORAGE=2" in name)
        assert made["instructions"] <= limits[kernel] + noise, name
        assert made["divisions"] == 0, name

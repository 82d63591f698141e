"""Shared by all tests: offline, one tolerance table, small models."""

import functools
import gc
import importlib.metadata
import os
import platform

# Transformers computes norms, rotary angles and losses in float32 even in a float64 model, and torch's AVX-512 kernels round
# those differently from the AVX2 ones that the recorded trajectories were made with (5e-8 apart after ten steps).
if platform.machine() in ("x86_64", "AMD64"):
    os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    # With AVX2 kernels on a CPU that has AMX, attention in bf16 would ask oneDNN for a packing that torch then refuses.
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

# Before anything imports Triton: without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# accelerate asks many times in every run whether PEFT is installed, and parses its metadata each time.
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

# The largest absolute difference allowed between two computations of the same thing, by dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


# Slow files start first, so that all workers end together.
SLOW = (
    "test_pretrained.py",
    "test_sharding.py",
    "test_distributed.py",
    "test_sweep_command.py",
    "test_compare_command.py",
    "test_bundled.py",
    "test_compiles.py",
    "test_kills.py",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(items):
    """Start the tests of SLURM and the slow files first. Workers take whole files (``--dist loadfile``): fixtures are shared."""
    items.sort(key=lambda item: ("cluster" not in item.fixturenames, item.path.name not in SLOW))


def pytest_collection_finish():
    """Keep the garbage collector, which trainers call often, from scanning the libraries again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # libraries that count objects at exit find none


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """The folder of a tiny random model with its tokenizer."""
    from tiny_checkpoints import save_tiny_checkpoint  # slow to import, and the core does not need it

    save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    return str(tmp_path / "tiny")

"""Shared by all tests: offline, one tolerance table, small models."""

import gc
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

# How far two computations of the same thing may lie apart (largest absolute difference), by the dtype they run in.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


# Files whose few tests take long: begun first, so that workers which share the tests end together.
SLOW = ("test_pretrained.py", "test_sharding.py", "test_sweep_command.py", "test_bundled.py", "test_faults.py")


def pytest_collection_modifyitems(items):
    """Let the tests of a file stay together, whose fixtures they share, and all those that need the one SLURM."""
    for item in items:
        own = "slurm" if "cluster" in item.fixturenames else str(item.path)
        item.add_marker(pytest.mark.xdist_group(own))
    items.sort(key=lambda item: "cluster" not in item.fixturenames and item.path.name not in SLOW)


def pytest_collection_finish():
    """Let no collection of garbage look through the libraries again: trainers ask for several in every run."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # so that libraries which count what is left at the end find nothing


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """The folder of a tiny random model with its tokenizer."""
    from tiny_checkpoints import save_tiny_checkpoint  # takes a while, and most tests of the core need no such thing

    save_tiny_checkpoint(tmp_path / "tiny")
    return str(tmp_path / "tiny")

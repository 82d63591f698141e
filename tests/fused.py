"""Where fused steps run in the tests, and how close to plain ones they have to come there."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The plain step multiplies in float32; on tensor cores the kernels multiply in TF32.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6} if DEVICE == "cpu" else {"rtol": 2e-3, "atol": 1e-4}
CLOSE = {"rtol": 1e-4 if DEVICE == "cpu" else 5e-3, "atol": 0.0}
"""Scores and norms."""

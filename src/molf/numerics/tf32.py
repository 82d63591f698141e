"""TF32 for the optimizer's own products of matrices, without a trace in the user's settings.

TF32 has 11 significant bits. Rounding a product's factors to them changes an update by about 1e-4 of itself, and tensor cores
multiply such factors several times as fast.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["tf32_products"]

# The setting is one for all threads, and in backward every device has a thread: the last to leave restores what the first found.
_lock = threading.Lock()
_inside = 0
_found: str | bool = "none"


@contextmanager
def tf32_products(device: torch.device) -> Iterator[None]:
    """Let float32 products on a CUDA device use TF32 inside a ``with`` block; elsewhere do nothing.

    Whatever the user has set, by ``torch.backends`` or ``torch.set_float32_matmul_precision``, reads the same afterwards, also
    after an error. A CUDA graph keeps the kernels that were chosen while it was captured.
    """
    global _inside, _found
    if device.type != "cuda":
        yield
        return
    with _lock:
        if _inside == 0:
            _found = _enable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore(_found)


def _enable() -> str | bool:
    """Switch TF32 on and return what restores the setting; PyTorch 2.8 knows the older switch only."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        before: bool = matmul.allow_tf32
        if not before:
            matmul.allow_tf32 = True
        return before
    found: str = matmul.fp32_precision
    if found != "tf32":
        matmul.fp32_precision = "tf32"
    # What equals the setting of all backends was most likely inherited from it, and goes on following it.
    inherited = found == torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "none" if inherited and found != "tf32" else found


def _restore(found: str | bool) -> None:
    matmul = torch.backends.cuda.matmul
    if isinstance(found, bool):
        if not found:
            matmul.allow_tf32 = False
    elif found != "tf32":
        matmul.fp32_precision = found

"""The routed step in Triton: a few launches for the whole model, no word to the host.

Letters: L routed layers, R LoRA experts a layer, E = R + 1 experts, S tensors (slots), N blocks of work.

1. ``products``: the gradients of all LoRA pairs from the dense gradients.
2. ``moments``: all experts' moments, and the sums that scores are made of, added up in a fixed order. Of moments in 8 bits
   only the sums (``packed``).
3. ``winners``: the AdamW step of the experts that won; what lost returns at once and is not read.
4. ``fold``: the winners' changes into the effective weights.
5. ``settle``: moments in 8 bits moved and written back, and the step of winners that have such.

Nothing here is imported unless a fused step is asked for. With ``TRITON_INTERPRET=1`` everything runs on a CPU, slowly.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch

from molf.distributed import is_sharded
from molf.scores import EPD, PFN, Score

__all__ = ["refusal"]


def refusal(groups: Sequence[dict[str, Any]], score: Score) -> str | None:
    """Say why the kernels can't take the step of these groups, or return None if they can.

    Args:
        groups: The optimizer's.
        score: What ranks the experts of a layer.
    """
    params = [p for group in groups for p in group["params"]]
    devices = {p.device for p in params}
    weights = {group["params"][0].dtype for group in groups if "module" in group}
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's CUDA builds for Linux bring it"
    if any(is_sharded(p) for p in params):
        return "the kernels work on whole weights, and these are sharded"
    if len(devices) > 1:
        return f"the kernels work on one device, and the parameters are on {', '.join(sorted(map(str, devices)))}"
    if params[0].device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the parameters are on the CPU, where PyTorch's own kernels are used"
    if type(score) not in (EPD, PFN):
        return f"the kernels know the scores epd and pfn, not {type(score).__name__}"
    if any(p.dtype not in (torch.float32, torch.bfloat16) for p in params) or len(weights) > 1:
        found = ", ".join(sorted(map(str, weights)))
        return f"the kernels need weights that are all float32 or all bfloat16, and the routed ones are {found}"
    if len({(group["betas"], group["eps"]) for group in groups}) > 1:
        return "the kernels work with one setting of betas and eps, and groups differ in it"
    return None

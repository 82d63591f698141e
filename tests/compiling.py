"""Compile for an H100 every kernel that a few steps launch, and print the resources of each as JSON. No GPU is needed.

Run as a script, in a process of its own without TRITON_INTERPRET: launches are compiled, not run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from molf import MoLF
from molf.kernels import step  # noqa: F401 - imported before TRITON_INTERPRET is set, below
from small import wide

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def block(dtype):
    """Layers of a block whose sizes are multiples of 64, as in Qwen, Llama and Gemma: for kernels they look alike."""
    sizes = [(192, 192), (192, 128), (192, 320), (320, 192)]
    layers = [nn.Linear(*size, bias=i < 2) for i, size in enumerate(sizes)]
    return nn.ModuleList([nn.Embedding(256, 192), nn.RMSNorm(192), *layers]).to(dtype)


VARIANTS = [  # together they launch every kernel with every storage of weights, and gradients of both dtypes
    (wide, torch.bfloat16, {"bf16_update": "stochastic", "optim_bits": 8, "ranks": (2,)}),
    (block, torch.bfloat16, {"optim_bits": 8, "ranks": (128,)}),
    (block, torch.bfloat16, {"bf16_update": "stochastic", "optim_bits": 8, "ranks": (128,)}),
    (block, torch.bfloat16, {"bf16_update": "stochastic", "ranks": (128,), "score": "pfn"}),
    (block, torch.bfloat16, {"ranks": (128,), "score": "coherence"}),
    (block, torch.float32, {"optim_bits": 8, "ranks": (128,)}),
    (block, torch.float32, {"ranks": (8, 128)}),
]


class CompileOnlyDriver:
    """An H100 to compile for; nothing can run on it."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def compiled_by(variants):
    """Return the compiled kernels that the first step of these variants launches, by name, and of which models they are."""
    found, models = {}, {}
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = [f"{k}={v}" for k, v in kwargs.items() if k in ("BF16", "STORAGE", "PRODUCT", "KIND", "HINT")]
        name = f"{self.__name__}({', '.join(constants)})"
        found[name] = kernel
        models.setdefault(name, set()).add(make.__name__)

    triton.JITFunction.run = compile_only
    driver.set_active(CompileOnlyDriver())
    os.environ["TRITON_INTERPRET"] = "1"
    for make, dtype, options in variants:
        model = make(dtype)
        optimizer = MoLF(model, fused=True, **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return found, models


def resources(kernel):
    """Return registers and memory of a thread, and the numbers of instructions that move elements, by their width in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", shown)[1]) for name in ("REG", "STACK"))
    moves = re.findall(r"(?:ld|st)\.global(?:\.[a-z_0-9:]+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    widths = [int(many or 1) * int(bits) // 8 for many, bits in moves]
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "widths": {width: widths.count(width) for width in sorted(set(widths))},
        "divisions": len(re.findall(r"\b(?:div|rem)\.[su]64", kernel.asm["ptx"])),
        "instructions": len(re.findall(r"^\s+[a-z@].*;", kernel.asm["ptx"], re.MULTILINE)),
    }


if __name__ == "__main__":
    kernels, models = compiled_by(VARIANTS)
    found = {name: {**resources(kernel), "models": sorted(models[name])} for name, kernel in sorted(kernels.items())}
    json.dump(found, sys.stdout, indent=1)

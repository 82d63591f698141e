"""How large a step of the routing log is in both formats, and how long it takes to write and to read it.

python benchmarks/routing_log.py
"""

import tempfile
import time
from pathlib import Path

import torch

from molf import Routing
from molf.integrations.routing_lines import CompactLines, PublishedLines
from molf.study.results.routing_reader import read_routing

EXPERTS = ("fft", "lora_r128")
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
DENSE = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(30)
    for name in (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
MIXTURE = tuple(
    f"model.layers.{layer}.{name}"
    for layer in range(48)
    for name in (
        *PROJECTIONS,
        *(f"mlp.experts.{stack}[{e}]" for stack in ("gate_up_proj", "down_proj") for e in range(128)),
    )
)
FORMATS = {"published": PublishedLines, "compact": CompactLines}


def decision(modules, generator):
    scores = torch.rand(len(modules), len(EXPERTS), dtype=torch.float64, generator=generator) * 1e-8
    return Routing(modules, EXPERTS, scores, scores == scores.amax(1, keepdim=True))


def measure(lines, modules, steps, path):
    """Return bytes of a step after the first, and milliseconds to write and to read a step."""
    generator = torch.Generator().manual_seed(0)
    decisions = [decision(modules, generator) for _ in range(steps)]
    before = time.perf_counter()
    written = [lines.encode(step, one) for step, one in enumerate(decisions, 1)]
    writing = (time.perf_counter() - before) / steps
    path.write_text("".join(written))
    before = time.perf_counter()
    read_routing(path)
    reading = (time.perf_counter() - before) / steps
    return len(written[-1]), 1e3 * writing, 1e3 * reading


def main():
    print("| layers | format | kB a step | header, kB | ms to write | ms to read |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for label, modules, steps in (
            ("210 (SmolLM2)", DENSE, 40),
            (f"{len(MIXTURE):,} matrices (a mixture of 48 x 128 experts)", MIXTURE, 4),
        ):
            for name, kind in FORMATS.items():
                size, writing, reading = measure(kind(), modules, steps, Path(folder) / "log")
                first = kind().encode(1, decision(modules, torch.Generator().manual_seed(0)))
                header = len(first[: first.index("\n")]) / 1e3 if first.count("\n") > 1 else 0.0
                print(f"| {label} | {name} | {size / 1e3:.1f} | {header:.1f} | {writing:.1f} | {reading:.1f} |")


if __name__ == "__main__":
    main()

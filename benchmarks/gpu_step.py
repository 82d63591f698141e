"""Part (b) of the GPU programme: the optimizer step against fused AdamW and 8-bit AdamWs, in time and in bytes moved.

The contenders work one after another on one model and its gradients, float32, since two states do not fit at 3B. All pairs have
moved once before, so that nothing is zero. The time of the device is taken between events behind a sleep that lets the host run
ahead; the time of the host is that until ``step`` returns. Bytes are those of ``gpu_cost``.

    python benchmarks/gpu_step.py     # what a step should cost, counted and not measured
"""

import importlib
import importlib.util
import statistics
import time

import torch

import gpu_cost
from gpu_report import device, forget
from models import random_model
from molf import MoLF
from timing import take_turns

# The rates decide who wins: a score is in proportion to its expert's.
FFT_WINS, LORA_WINS = {"lr": 1e-6, "lora_lr": 1e-14}, {"lr": 1e-14, "lora_lr": 1e-6}
CONTENDERS = {
    "FFT wins": (FFT_WINS, {"fused": True}, 2.0),
    "LoRA wins": (LORA_WINS, {"fused": True}, 1.8),
    "FFT wins, PyTorch's kernels": (FFT_WINS, {"fused": False}, None),
    "LoRA wins, PyTorch's kernels": (LORA_WINS, {"fused": False}, None),
    "FFT wins, 8-bit": (FFT_WINS, {"fused": True, "optim_bits": 8}, None),
    "LoRA wins, 8-bit": (LORA_WINS, {"fused": True, "optim_bits": 8}, None),
}
OTHERS = {"torchao 8-bit": ("torchao.optim", "AdamW8bit"), "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit")}
ROUNDS, WARM_UP = (10, 3) if device().type == "cuda" else (1, 0)  # there it is Triton's interpreter


def copy_bandwidth():
    """Return the bytes a second of copying a large tensor, read and written."""
    source = torch.empty(1 << (28 if device().type == "cuda" else 20), device=device())
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, ROUNDS, WARM_UP)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def seconds_of(optimizer):
    """Return the seconds that the device and the host take for a step, medians; equal on a CPU."""
    for _ in range(WARM_UP):
        optimizer.step()
    found = []
    for _ in range(ROUNDS):
        if device().type != "cuda":
            began = time.perf_counter()
            optimizer.step()
            found.append((time.perf_counter() - began,) * 2)
            continue
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        first.record()
        began = time.perf_counter()
        optimizer.step()
        host = time.perf_counter() - began
        last.record()
        torch.cuda.synchronize()
        found.append((first.elapsed_time(last) / 1e3, host))
    return tuple(map(statistics.median, zip(*found, strict=True)))


def bytes_of(model, rank, bits, fft_wins):
    """Return the bytes that a step of MoLF moves."""
    routed = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    weights, (in_A, in_B) = sum(w.numel() for w in routed), (rank * sum(w.shape[i] for w in routed) for i in (1, 0))
    others = sum(p.numel() for p in model.parameters()) - weights
    return sum(cost.bytes for cost in gpu_cost.step(weights, others, in_A, in_B, len(routed), rank, fft_wins, bits))


def started(model, rank, rates, **options):
    """Return an optimizer whose pairs have all won once, with the rates that decide who wins from now on."""
    optimizer = MoLF(model, ranks=(rank,), **LORA_WINS, **options)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = rates["lr"]
        if "module" in group:
            group["lora_lr_ratio"] = rates["lora_lr"] / rates["lr"]
    return optimizer


def measure(report, shape, rank):
    """Measure all contenders on one shape; needs memory for its weights, gradients and one state in float32."""
    bandwidth = copy_bandwidth()
    model = random_model(shape, device())
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in model.parameters())
    baseline, host = seconds_of(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))
    forget()
    report.add(
        *("step", f"{shape}: fused AdamW", 1.0, "x"),
        note=speed(baseline, host, 28 * count, bandwidth) + f", {count:,} weights",
    )
    for name, (rates, options, limit) in CONTENDERS.items():
        case = f"{shape}: MoLF, {name}"

        def work(rates=rates, options=options, limit=limit, case=case):
            optimizer = started(model, rank, rates, **options)
            seconds, host = seconds_of(optimizer)
            moved = bytes_of(model, rank, options.get("optim_bits", 32), rates is FFT_WINS)
            floor = f", x{moved / (28 * count):.2f} by bytes"
            report.add(
                "step", case, seconds / baseline, "x", limit, note=speed(seconds, host, moved, bandwidth) + floor
            )
            _check_winner(optimizer, "fft" if rates is FFT_WINS else f"lora_r{rank}")
            report.profiles[case] = profile(optimizer)

        report.attempt("step", case, work)
        forget()
    for name, (module, kind) in OTHERS.items():
        case = f"{shape}: {name}"
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            report.add("step", case, None, "", note="not installed")
            continue

        def work(module=module, kind=kind, case=case):
            optimizer = getattr(importlib.import_module(module), kind)(model.parameters(), lr=1e-6)
            seconds, host = seconds_of(optimizer)
            report.add("step", case, seconds / baseline, "x", note=f"{seconds * 1e3:.2f} ms, host {host * 1e3:.2f}")

        report.attempt("step", case, work)
        forget()


def speed(seconds, host, moved, bandwidth):
    rate = moved / seconds
    return f"{seconds * 1e3:.2f} ms, host {host * 1e3:.2f}, {rate / 1e9:,.0f} GB/s, {rate / bandwidth:.0%} of a copy's"


def _check_winner(optimizer, expected):
    won = {expert for winners in optimizer.routing.winners().values() for expert in winners}
    if won != {expected}:
        raise RuntimeError(f"{won} won where {expected} was to win; the time is of another case")


def profile(optimizer):
    """Return the kernels that a step spends its time in, the longest first, in milliseconds."""
    if device().type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        optimizer.step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:15]
    return [{"kernel": e.key, "calls": e.count, "ms": e.self_device_time_total / 1e3} for e in events]


if __name__ == "__main__":
    gpu_cost.main()

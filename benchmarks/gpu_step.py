"""Part (b) of the GPU programme: the optimizer step against fused AdamW and 8-bit AdamWs, in time and in bytes moved.

The contenders work one after another on one model and its gradients, float32, since two states do not fit at 3B. Bytes are
counted from what has to be read and written, each tensor once for each pass over it:

    fused AdamW               28 a parameter
    MoLF, all                 4 for the norm of the gradients, which says whether the step is taken
    MoLF, ordinary parameter  20 for the moments, 16 for the step
    MoLF, routed weight       20, 4 for each product with G, 16 if it wins, 8 for the fold if a pair wins; no dA until B moved
    MoLF, pair                4 written as gradient, 20, and 20 if it wins
    with 8-bit moments        6 and 8 for a weight's moments instead of 20, 8 instead of 16 if it wins
"""

import importlib
import importlib.util
import statistics

import torch

from gpu_report import device, forget
from models import random_model
from molf import MoLF
from timing import take_turns

# The rates decide who wins: a score is in proportion to its expert's.
FFT_WINS, LORA_WINS = {"lr": 1e-6, "lora_lr": 1e-14}, {"lr": 1e-14, "lora_lr": 1e-6}
CONTENDERS = {
    "FFT wins": (FFT_WINS, 32, 1.5),
    "LoRA wins": (LORA_WINS, 32, 1.0),
    "FFT wins, 8-bit": (FFT_WINS, 8, None),
    "LoRA wins, 8-bit": (LORA_WINS, 8, None),
}
OTHERS = {"torchao 8-bit": ("torchao.optim", "AdamW8bit"), "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit")}
ROUNDS, WARM_UP = (10, 3) if device().type == "cuda" else (1, 1)  # there it is Triton's interpreter


def copy_bandwidth():
    """Return the bytes a second of copying a large tensor, read and written."""
    source = torch.empty(1 << (28 if device().type == "cuda" else 20), device=device())
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, ROUNDS, WARM_UP)["copy"]
    return 2 * source.numel() * source.element_size() / statistics.median(seconds)


def seconds_of(optimizer):
    return statistics.median(take_turns({"step": optimizer.step}, ROUNDS, WARM_UP)["step"])


def counts_of(model, rank):
    """Return the elements of routed weights, of their LoRA pairs, and of everything that trains."""
    routed = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    everything = sum(p.numel() for p in model.parameters())
    return sum(w.numel() for w in routed), sum(rank * sum(w.shape) for w in routed), everything


def bytes_of(counts, bits, fft_wins, b_is_nonzero):
    """Return the bytes that a step of MoLF moves; ``b_is_nonzero`` says whether pairs have moved before, and so have a dA."""
    weights, pairs, everything = counts
    moments, step = (20, 16) if bits == 32 else (14, 8)
    products = 8 if b_is_nonzero else 4
    won = weights * step if fft_wins else weights * 8 + pairs * 20
    return (
        everything * 4 + weights * (moments + products) + (everything - weights) * (moments + step) + pairs * 24 + won
    )


def print_floors(shapes, rank):
    """Print what a float32 step can be at best, counted in bytes, against fused AdamW's."""
    for shape in shapes:
        counts = counts_of(random_model(shape, "meta"), rank)
        cases = {"FFT wins, no pair moved yet": (True, False), "FFT wins": (True, True), "LoRA wins": (False, True)}
        floors = {case: bytes_of(counts, 32, *how) / (28 * counts[-1]) for case, how in cases.items()}
        print(f"{shape}: " + ", ".join(f"{case} x{floor:.2f}" for case, floor in floors.items()))


def measure(report, shape, rank):
    """Measure all contenders on one shape; needs memory for its weights, gradients and one state in float32."""
    bandwidth = copy_bandwidth()
    model = random_model(shape, device())
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in model.parameters())
    baseline = seconds_of(torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))
    forget()
    report.add(
        *("step", f"{shape}: fused AdamW", 1.0, "x"),
        note=speed(baseline, 28 * count, bandwidth) + f", {count:,} weights",
    )
    for name, (rates, bits, limit) in CONTENDERS.items():
        case = f"{shape}: MoLF, {name}"

        def work(rates=rates, bits=bits, limit=limit, case=case):
            optimizer = MoLF(model, ranks=(rank,), fused=True, optim_bits=bits, **rates)
            seconds = seconds_of(optimizer)
            fft_wins = rates is FFT_WINS
            moved = bytes_of(counts_of(model, rank), bits, fft_wins, b_is_nonzero=not fft_wins)
            floor = f", x{moved / (28 * count):.2f} by bytes"
            report.add("step", case, seconds / baseline, "x", limit, note=speed(seconds, moved, bandwidth) + floor)
            _check_winner(optimizer, "fft" if rates is FFT_WINS else f"lora_r{rank}")
            if limit is not None and seconds / baseline > limit:
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
            seconds = seconds_of(optimizer)
            report.add("step", case, seconds / baseline, "x", note=f"{seconds * 1e3:.2f} ms")

        report.attempt("step", case, work)
        forget()


def speed(seconds, moved, bandwidth):
    rate = moved / seconds
    return f"{seconds * 1e3:.2f} ms, {rate / 1e9:,.0f} GB/s, {rate / bandwidth:.0%} of a copy's"


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
    print_floors(("qwen2.5-1.5b", "qwen2.5-3b"), rank=128)

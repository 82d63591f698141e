"""Parts (c) and (d) of the GPU programme: whole training steps, in tokens a second and peak memory, and 3B on one 24 GB card."""

import statistics

import torch
from peft import LoraConfig, get_peft_model

from gpu_report import device, forget, peak_bytes
from models import random_model
from molf import MoLF, add_lora_experts
from timing import take_turns

SEQUENCE, ROUNDS, WARM_UP = (512, 4, 2) if device().type == "cuda" else (32, 1, 0)
GB = 1e9


def lora(model, rank):
    config = LoraConfig(r=rank, lora_alpha=32, use_rslora=True, target_modules="all-linear")
    return get_peft_model(model, config)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def contenders(rank):
    """Return how each contender is made: a model with its adapters, and an optimizer."""
    small = max(rank // 4, 1)
    return {
        "FFT, fused AdamW": (lambda model: model, adamw),
        f"LoRA r{rank}": (lambda model: lora(model, rank), adamw),
        "MoLF, merged": (lambda model: model, lambda model: MoLF(model, ranks=(rank,), lr=1e-6, fused=True)),
        "MoLF, branched, dropout": (
            lambda model: add_lora_experts(model, (rank,), lora_dropout=0.05, freeze_base=False),
            lambda model: MoLF(model, lr=1e-6, fused=True),
        ),
        f"LoRA r{small + rank}": (lambda model: lora(model, small + rank), adamw),
        "MoLF-Efficient": (
            lambda model: add_lora_experts(model, (small, rank)),
            lambda model: MoLF(model, lr=1e-6, fused=True),
        ),
    }


def recompute_activations(model):
    """Keep the activations between blocks only; transformers renamed how that is asked for."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def step_of(model, optimizer, batch):
    """Return one training step on random tokens, bf16 autocast."""
    ids = torch.randint(model.config.vocab_size, (batch, SEQUENCE), device=device())

    def step():
        with torch.autocast(device().type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(report, shape, rank, tokens):
    """Train every contender for a few steps of so many tokens each, float32 weights under bf16 autocast."""
    for count in tokens:
        seen = {}
        for name, (adapt, optimize) in contenders(rank).items():
            case = f"{shape}, {count} tokens: {name}"

            def work(name=name, adapt=adapt, optimize=optimize, case=case, seen=seen, count=count):
                seen[name] = one(shape, adapt, optimize, max(1, count // SEQUENCE))
                speed, peak, _ = seen[name]
                report.add("training", case, speed, "tokens/s", note=f"peak {peak / GB:.2f} GB")

            report.attempt("training", case, work)
            forget()
        compare(report, seen, f"{shape}, {count} tokens", rank)


def one(shape, adapt, optimize, batch):
    """Return tokens a second, the peak of memory, and the elements in LoRA pairs that the optimizer keeps."""
    model = random_model(shape, device())
    model = adapt(model).to(device())
    optimizer = optimize(model)
    seconds = take_turns({"step": step_of(model, optimizer, batch)}, ROUNDS, WARM_UP)["step"]
    own = 0
    if isinstance(optimizer, MoLF):
        layers = [optimizer.experts[module] for module in optimizer.experts]
        own = sum(e.A.numel() + e.B.numel() for layer in layers for name, e in layer.items() if name != "fft")
    return batch * SEQUENCE / statistics.median(seconds), peak_bytes(), own


def compare(report, seen, case, rank):
    """Add the ratios that have limits, of those that were measured."""
    small = max(rank // 4, 1)
    wanted = (
        ("MoLF, merged", "FFT, fused AdamW", 0.97),
        ("MoLF, merged", "MoLF, branched, dropout", 1.5),
        ("MoLF-Efficient", f"LoRA r{small + rank}", 1 / 1.05),
    )
    for name, other, limit in wanted:
        if name in seen and other in seen:
            report.add("training", f"{case}: {name} / {other}", seen[name][0] / seen[other][0], "x", limit, least=True)
    if {"MoLF, merged", "FFT, fused AdamW"} <= seen.keys() and peak_bytes():
        _, peak, pairs = seen["MoLF, merged"]
        allowed = 1.02 * seen["FFT, fused AdamW"][1] + 12 * pairs  # float32 pairs with two moments
        report.add("training", f"{case}: peak of MoLF / of FFT with pairs and 2 %", peak / allowed, "x", 1.0)


def measure_capped(report, shape, rank, gib=24):
    """Train under a cap of memory: bf16 weights rounded at random, 8-bit moments, gradients released inside backward."""
    case = f"{shape} in {gib} GiB: bf16 stochastic, 8-bit, released gradients"
    if device().type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))

    def work():
        model = random_model(shape, device(), torch.bfloat16)
        recompute_activations(model)
        how = {"bf16_update": "stochastic", "optim_bits": 8, "optimizer_in_backward": True, "fused": True}
        optimizer = MoLF(model, ranks=(rank,), lr=1e-6, **how)
        seconds = take_turns({"step": step_of(model, optimizer, 1)}, ROUNDS, WARM_UP)["step"]
        note = f"{SEQUENCE / statistics.median(seconds):,.0f} tokens/s at {SEQUENCE} tokens a step"
        if device().type != "cuda":
            return report.add("capped", case, None, "GiB", note=f"no memory of a GPU to cap; it ran, {note}")
        return report.add("capped", case, peak_bytes() / 2**30, "GiB", gib, note=note)

    try:
        report.attempt("capped", case, work)
    finally:
        if device().type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    forget()

"""The recorded trajectories of the published implementation, reproduced by both forms in float64."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import Qwen2Config, Qwen2ForCausalLM

from conftest import TOLERANCE
from molf import MoLF, add_lora_experts

CASES = sorted((Path(__file__).parent / "golden").glob("*.json"))
FORMS = [
    pytest.param(path, form, id=f"{path.stem}-{form}")
    for path in CASES
    for form in ("merged", "branched")
    if form == "branched" or json.loads(path.read_text())["train_base"]
]


def build(case, init, form, dtype=torch.float64, **options):
    shape = {k: v for k, v in case["model"].items() if k != "family"}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=64)).to(dtype).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(init[name])
    lora = {"ranks": tuple(case["ranks"]), "lora_alpha": case["lora_alphas"], "use_rslora": case["use_rslora"]}
    trained = dict(model.named_parameters())
    if form == "branched":
        model, lora = add_lora_experts(model, freeze_base=not case["train_base"], **lora), {}
    optimizer = MoLF(
        model,
        lr=case["lr_fft"],
        lora_lr=case["lr_lora"],
        weight_decay=case["weight_decay_fft"],
        lora_weight_decay=case["weight_decay_lora"],
        betas=tuple(case["betas"]),
        eps=case["eps"],
        top_k=case["top_k"],
        score=case["score"],
        **lora,
        **options,
    )
    for module in optimizer.experts:
        for i, rank in enumerate(case["ranks"]):
            pair = {"A": init[f"{module}.lora_A.{i}"], "B": init[f"{module}.lora_B.{i}"]}
            optimizer.experts[module][f"lora_r{rank}"].assign(**pair)
    return model, optimizer, trained


def tensor_named(name, trained, optimizer, ranks):
    """Find a recorded tensor: `W` of a routed layer, one of its pairs, or an ordinary parameter."""
    parts = name.split(".")
    if parts[-1].isdigit():
        expert = optimizer.experts[".".join(parts[:-2])][f"lora_r{ranks[int(parts[-1])]}"]
        return expert.A if parts[-2] == "lora_A" else expert.B
    module, leaf = name.rsplit(".", 1)
    if module in optimizer.experts:
        return getattr(optimizer.experts[module]["fft"], leaf)
    return trained[name].detach()


def follow(path, form, tolerance, steps, **options):
    """Take the recorded steps, every decision and recorded tensor compared; return the case, its data and the model."""
    case, data = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    init = {k.removeprefix("init/"): v for k, v in data.items() if k.startswith("init/")}
    model, optimizer, trained = build(case, init, form, **options)
    scheduler = LambdaLR(optimizer, lambda step: case["lr_factor"][min(step, case["steps"] - 1)])
    for step in range(min(steps, case["steps"])):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(case["accumulation"]):
            ids = data["input_ids"][step * case["accumulation"] + micro]
            loss = model(input_ids=ids, labels=ids).loss / case["accumulation"]
            loss.backward()
            total += loss.item()
        assert total == pytest.approx(case["loss"][step], abs=tolerance)
        optimizer.step()
        scheduler.step()
        recorded = {m: [w.replace("base", "fft") for w in ws] for m, ws in case["selection"][step].items()}
        assert optimizer.routing.winners() == recorded
        for key, value in data.items():
            if key.startswith(f"step{step}/"):
                got = tensor_named(key.split("/", 1)[1], trained, optimizer, case["ranks"]).double()
                torch.testing.assert_close(got, value, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
    return case, data, model


@pytest.mark.parametrize(("path", "form"), FORMS)
def test_recorded_trajectory(path, form):
    case, data, model = follow(path, form, TOLERANCE[torch.float64], steps=1000)
    logits = model(input_ids=data["input_ids"][0]).logits
    torch.testing.assert_close(logits, data["merged_logits"], rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize(("path", "form"), FORMS)
def test_recorded_trajectory_by_the_kernels(path, form):
    """In float32, as far as its rounding leaves the decisions alone."""
    pytest.importorskip("triton", reason="Triton is not installed")
    follow(path, form, 2e-5, steps=3, dtype=torch.float32, fused=True)

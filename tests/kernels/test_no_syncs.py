"""A fused step never syncs. On a GPU it is also captured in a CUDA graph."""

import copy
import weakref

import pytest
import torch

from dispatch_modes import NoScalarReads, NoSyncs
from fused import DEVICE, quantizable
from molf import MoLF
from molf.kernels import prepared, step
from sharding import adapted
from small import differing, loss_of, mlp, snapshot, train

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def no_syncs():
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
    else:
        with NoSyncs(), NoScalarReads():
            yield


def test_syncs_are_noticed():
    x = torch.ones(2, 2)
    for sync in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: float(x[0, 0]), x.tolist, x.cpu):
        with pytest.raises(AssertionError), NoSyncs():
            sync()
    with pytest.raises(AssertionError), NoScalarReads():
        torch.full((2,), x[0, 0])


def static_gradients(model, t):
    """Give a model the gradients of step ``t``, always in the same tensors."""
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.copy_(torch.randn(p.shape, generator=generator) * 0.1)


KINDS = {
    "float32": (torch.float32, {}),
    "clipped, pfn": (torch.float32, {"max_grad_norm": 0.1, "score": "pfn", "top_k": 2}),
    "adamw": (torch.float32, {"ranks": ()}),
    "bf16 split": (torch.bfloat16, {}),
    "bf16 stochastic": (torch.bfloat16, {"bf16_update": "stochastic"}),
    "8 bits": (torch.float32, {"optim_bits": 8}),
    "rate on the device": (torch.float32, {"lr": "tensor"}),
}
kinds = pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())


def warmed_up(dtype, options, model=None):
    """A model and an optimizer after two steps."""
    model = (model or (quantizable(dtype) if "optim_bits" in options else mlp(dtype))).to(DEVICE)
    if options.get("lr") == "tensor":
        options = {**options, "lr": torch.tensor(1e-2, device=DEVICE)}
    torch.manual_seed(1)
    optimizer = MoLF(model, **{"ranks": (2, 4), "lr": 1e-2, "fused": True, **options})
    for t in range(2):
        static_gradients(model, t)
        optimizer.step()
    return model, optimizer


@kinds
def test_a_step_neither_syncs_nor_copies_a_table_if_gradients_stay_in_place(dtype, options, monkeypatch, request):
    model, optimizer = warmed_up(dtype, options)

    def copied(*args):
        raise AssertionError("a table is copied")

    for name in ("launches", "prepared"):
        monkeypatch.setattr(f"molf.kernels.{name}.to_device", copied)
    request.getfixturevalue("no_syncs")
    for t in (2, 3):
        static_gradients(model, t)
        optimizer.step()


def test_a_gradient_elsewhere_and_another_rate_copy_one_table_each(monkeypatch):
    model, optimizer = warmed_up(torch.float32, {})
    copies, to_device = [], prepared.to_device
    monkeypatch.setattr(prepared, "to_device", lambda *args: copies.append(args) or to_device(*args))
    for p in model.parameters():
        p.grad = p.grad.clone()
    optimizer.step()
    assert len(copies) == 1
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    assert len(copies) == 2


def test_the_gradients_are_freed_after_a_step(monkeypatch):
    made, found = step.pair_gradients, []

    def watched(pairs, dense, dAs, dBs):
        found.extend(weakref.ref(x) for x in (*dense, *dAs, *dBs, dAs[0]._base))
        return made(pairs, dense, dAs, dBs)

    monkeypatch.setattr(step, "pair_gradients", watched)
    model, optimizer = warmed_up(torch.float32, {})
    optimizer.zero_grad()
    assert found and all(x() is None for x in found) and model


def test_adapters_do_not_sync(request):
    _, optimizer = warmed_up(torch.float32, {"ranks": None}, adapted(freeze=False, dtype=torch.float32))
    request.getfixturevalue("no_syncs")
    optimizer.step()


def test_rates_of_zero_and_a_loss_scale_do_not_sync(request):
    model, optimizer = warmed_up(torch.float32, {})
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    request.getfixturevalue("no_syncs")
    optimizer.step()


def test_gradient_release_does_not_sync(request):
    model = mlp(torch.float32).to(DEVICE)
    optimizer = MoLF(model, ranks=(2,), fused=True, optimizer_in_backward=True)
    train(model, optimizer, 2)
    loss = loss_of(model, 2)
    request.getfixturevalue("no_syncs")
    loss.backward()
    optimizer.step()


def test_a_rate_on_the_device_is_the_rate():
    model, optimizer = warmed_up(torch.float32, {"lr": "tensor", "lora_lr": 2e-2})
    twin, other = warmed_up(torch.float32, {"lora_lr": 2e-2})
    for t in range(2, 4):
        for group, twins in zip(optimizer.param_groups, other.param_groups, strict=True):
            group["lr"].fill_(1e-2 / t)
            twins["lr"] = float(group["lr"])
        for m, o in ((model, optimizer), (twin, other)):
            static_gradients(m, t)
            o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@gpu
@kinds
def test_a_captured_step_is_the_step(dtype, options):
    model, optimizer = warmed_up(dtype, options)
    twin, other = copy.deepcopy((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(2, 5):
        static_gradients(model, t)
        if t == 3:
            next(model.parameters()).grad.view(-1)[0] = float("nan")
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad.copy_(p.grad)
        if isinstance(optimizer.param_groups[0]["lr"], torch.Tensor):
            for group in (*optimizer.param_groups, *other.param_groups):
                group["lr"].fill_(1e-2 / t)
        graph.replay()
        other.step()
    assert not differing(snapshot(model, optimizer), snapshot(twin, other))
    assert optimizer.skipped_steps == other.skipped_steps == 1


@gpu
def test_a_graph_outlives_other_steps():
    """A step of its own between replays has tables of its own; what is freed is overwritten."""
    model, optimizer = warmed_up(torch.float32, {})
    captured = [p.grad for p in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for p in model.parameters():
        p.grad = p.grad.clone()
    optimizer.step()
    rubbish = [torch.full((n,), -1, device=DEVICE) for n in range(1, 200)]
    twin, other = copy.deepcopy((model, optimizer))
    for p, q, grad in zip(model.parameters(), twin.parameters(), captured, strict=True):
        p.grad, q.grad = grad, grad.clone()
    graph.replay()
    other.step()
    assert rubbish and not differing(snapshot(model, optimizer), snapshot(twin, other))


@gpu
def test_gradients_that_move_while_capturing_are_refused():
    model, optimizer = warmed_up(torch.float32, {})
    for p in model.parameters():
        p.grad = p.grad.clone()
    with pytest.raises(RuntimeError, match="has changed since the last step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()

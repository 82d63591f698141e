"""Which kernels ``fused=None`` selects. Here the Triton kernels may run on a CPU, in the interpreter."""

import copy
import logging
import pickle

import pytest
import torch

from emulated_tf32 import EmulatedTF32
from forked import on_two_ranks
from fused import CLOSE, DEVICE, TOLERANCE, quantizable
from molf import MoLF
from molf.optimizer import kernel_choice
from molf.routing import choose
from molf.scores import EPD
from small import loss_of, mlp, train, wide

kernels = pytest.importorskip("molf.kernels.step", reason="Triton is not installed", exc_type=ImportError)


@pytest.fixture
def usable(monkeypatch):
    """Kernels may be chosen on a CPU and pass every self-test untested; returns the signatures to test."""
    signatures = []
    monkeypatch.setattr(kernel_choice, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(kernel_choice, "self_test", signatures.append)
    return signatures


def step(model, optimizer, t=0):
    train(model, optimizer, [t])


def made(dtype=torch.float32, make=mlp, **options):
    model = make(dtype).to(DEVICE)
    torch.manual_seed(0)
    return model, MoLF(model, ranks=(2,), lr=1e-2, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU uses the kernels")
def test_on_a_cpu_pytorchs_kernels_are_chosen_silently(caplog):
    model, optimizer = made()
    with caplog.at_level(logging.INFO, "molf"):
        step(model, optimizer)
    assert optimizer.fused_in_use is False and not caplog.records


@pytest.mark.parametrize("fused", [True, False])
def test_a_requested_choice_is_not_tested(fused, usable):
    model, optimizer = made(fused=fused)
    step(model, optimizer)
    assert optimizer.fused_in_use is fused and not usable


class OwnScore(EPD):
    """A score that the kernels do not have."""

    name = "own"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float64}, "all float32 or all bfloat16"),
        ({"score": OwnScore()}, "scores epd, pfn, descent, random, coherence, shuffled, not OwnScore"),
    ],
)
def test_where_kernels_do_not_apply_pytorchs_are_chosen_silently(options, words, usable, caplog):
    model, optimizer = made(**options)
    with caplog.at_level(logging.DEBUG, "molf.optimizer.kernel_choice"):
        step(model, optimizer)
    assert optimizer.fused_in_use is False and not usable
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG and words in record.getMessage()


def test_the_choice_is_made_once_and_logged(usable, caplog):
    model, optimizer = made()
    assert optimizer.fused is None and optimizer.fused_in_use is None and not usable
    with caplog.at_level(logging.INFO, "molf.optimizer.kernel_choice"):
        for t in range(2):
            step(model, optimizer, t)
    assert len(usable) == 1 and optimizer.fused is None and optimizer.fused_in_use is True
    (message,) = caplog.messages
    assert message.startswith(f"Using Triton kernels on {DEVICE}")


def test_the_choice_stays_while_betas_are_cycled(usable):
    """All alike, as by OneCycleLR."""
    model, optimizer = made()
    for t in range(3):
        for group in optimizer.param_groups:
            group["betas"] = (0.9 - t / 10, 0.999)
        step(model, optimizer, t)
    assert len(usable) == 1 and optimizer.fused_in_use is True


def test_the_choice_is_made_again_if_settings_change(usable):
    model, optimizer = made()
    step(model, optimizer)
    optimizer.param_groups[0]["eps"] = 1e-6  # now groups differ
    step(model, optimizer)
    assert optimizer.fused_in_use is False
    optimizer.param_groups[0]["eps"] = 1e-8
    step(model, optimizer)
    assert optimizer.fused_in_use is True and len(usable) == 2


def test_a_failed_self_test_is_logged_once_and_pytorchs_kernels_are_used(monkeypatch, caplog):
    monkeypatch.setattr(kernel_choice, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(kernel_choice, "self_test", lambda signature: "a score: off by 0.5")
    model, optimizer = made()
    plain, slow = made(fused=False)
    for t in range(2):
        step(model, optimizer, t)
        step(plain, slow, t)
    (message,) = caplog.messages
    assert "a score: off by 0.5" in message and "fused=True insists" in message and "fused=False never" in message
    assert optimizer.fused_in_use is False
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.equal(q)


def test_an_error_of_triton_fails_the_self_test(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernel_choice, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(kernels, "launch", no_compiler)
    kernel_choice.self_test.cache_clear()
    model, optimizer = made()
    try:
        step(model, optimizer)
        assert optimizer.fused_in_use is False
        monkeypatch.undo()
        assert kernel_choice.self_test.cache_info().currsize == 1, "tested once per process"
    finally:
        kernel_choice.self_test.cache_clear()


def test_kernels_that_pass_the_self_test_are_used(monkeypatch):
    monkeypatch.setattr(kernel_choice, "kernels_run_on", lambda device: True)
    kernel_choice.self_test.cache_clear()
    model, optimizer = made()
    step(model, optimizer)
    assert optimizer.fused_in_use is True and kernel_choice.self_test.cache_info().currsize == 1


@pytest.mark.parametrize("release", [False, True])
def test_pytorchs_kernels_take_gradients_that_triton_cannot_read(release, usable):
    model, optimizer = made(optimizer_in_backward=release)
    other, slow = made(fused=False, optimizer_in_backward=release)
    for t in range(2):
        for net in (model, other):
            if t == 1:
                hook = net[1].weight.register_hook(lambda grad: grad.t().contiguous().t())
            loss_of(net, t).backward()
            if t == 1:
                hook.remove()
        for one in (optimizer, slow):
            one.step()
            one.zero_grad()
        assert optimizer.fused_in_use is True and optimizer.routing.winners() == slow.routing.winners()
        torch.testing.assert_close(optimizer.grad_norm.cpu().double(), slow.grad_norm.cpu().double(), **CLOSE)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.bfloat16}, {"make": quantizable, "optim_bits": 8, "eps": 1e-4}]
)
def test_any_step_may_be_taken_by_either(first, options):
    """Step counts, moments, low parts and the count of skipped steps continue from the other's."""
    model, optimizer = made(**options)
    other, slow = made(fused=False, **options)
    for t in range(3):
        optimizer.fused = first if t % 2 == 0 else not first
        for net, one in ((model, optimizer), (other, slow)):
            one.zero_grad()
            loss_of(net, t).backward()
            if t == 1:
                net[1].weight.grad[0, 0] = torch.nan
            one.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if "step" in slow.state[q]:
                assert float(optimizer.state[p]["step"]) == float(slow.state[q]["step"])
    assert optimizer.skipped_steps == slow.skipped_steps == 1
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        within = {"rtol": 2**-7, "atol": 1e-5} if p.dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(p, q, **within)


def test_copies_choose_for_themselves(usable):
    model, optimizer = made()
    step(model, optimizer)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.fused is None and copied.fused_in_use is None


def _choice_of_rank(rank):
    messages = []
    logger = logging.getLogger("molf.optimizer.kernel_choice")
    logger.addFilter(lambda record: messages.append(record.getMessage()) or False)
    kernel_choice.kernels_run_on = lambda device: True
    kernel_choice.self_test = lambda signature: "no compiler" if rank == 1 else None
    model, optimizer = made()
    step(model, optimizer)
    return optimizer.fused_in_use, messages


@pytest.mark.skipif(DEVICE != "cpu", reason="the two processes share one GPU")
def test_if_one_rank_cannot_use_the_kernels_none_does(tmp_path):
    (first, leader), (second, other) = on_two_ranks(_choice_of_rank, tmp_path)
    assert first is second is False
    assert "cannot be used on all ranks" in leader[0] and "no compiler" in other[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_uses_the_kernels(dtype):
    model, optimizer = made(dtype)
    step(model, optimizer)
    assert optimizer.fused_in_use is True


SIGNATURES = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16, "score": "pfn"},
    "bf16, stochastic, 8 bits": {"dtype": torch.bfloat16, "make": wide, "bf16_update": "stochastic", "optim_bits": 8},
}


def signature(**options):
    _, optimizer = made(**options)
    return kernel_choice.signature_of(optimizer._begin())


@pytest.mark.parametrize("options", SIGNATURES.values(), ids=SIGNATURES)
def test_right_kernels_pass_and_draw_no_random_number(options):
    tested, before = signature(**options), torch.random.get_rng_state()
    with torch.enable_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert kernel_choice.self_test.__wrapped__(tested) is None
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_self_test_does_not_depend_on_the_default_dtype(dtype):
    tested = signature()
    torch.set_default_dtype(dtype)
    try:
        assert kernel_choice.self_test.__wrapped__(tested) is None
    finally:
        torch.set_default_dtype(torch.float32)


def test_adapters_pass():
    tested = signature()._replace(form="branched", experts=("fft", "lora_r2"), dtypes=(torch.float32,) * 3, ranks=(2,))
    assert kernel_choice.self_test.__wrapped__(tested) is None


def test_signatures_differ_where_kernels_do():
    found = {signature(**options) for options in SIGNATURES.values()}
    assert len(found) == len(SIGNATURES) and signature() in found


SPOILERS = {
    "_update_moments": lambda step: step._plan.entries[0].tensor.exp_avg.view(-1)[0].add_(1.0),
    "_move_ordinary": lambda step: step._plan.ordinary[0].params[0].view(-1)[0].add_(1.0),
    "_launch_winners": lambda step, *_: step._plan.entries[0].tensor.param.view(-1)[0].add_(1.0),
    "_move_chunk": lambda step, _: step._plan.pairs[0][1].tensor.param.view(-1)[0].add_(1.0),
    "_prepare_gradients": lambda step, buffer: buffer.mul_(1.5),
    "_decide": lambda step, *_: step._plan.update_counts[0].add_(1),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_wrong_kernel_fails_the_self_test(name, monkeypatch):
    right = getattr(kernels._Step, name)

    def wrong(*args):
        result = right(*args)
        SPOILERS[name](*args)
        return result

    monkeypatch.setattr(kernels._Step, name, wrong)
    assert "is off by" in kernel_choice.self_test.__wrapped__(signature())


def test_a_wrong_decision_fails_the_self_test(monkeypatch):
    monkeypatch.setattr(kernels, "choose", lambda scores, top_k: choose(-scores, top_k))
    assert "other winners" in kernel_choice.self_test.__wrapped__(signature())


def test_rounding_to_tf32_passes():
    with EmulatedTF32():
        assert kernel_choice.self_test.__wrapped__(signature()) is None

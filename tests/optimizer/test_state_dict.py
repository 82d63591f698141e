import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from molf import MoLF
from molf.errors import MolfError
from small import assert_same_bits, differing, mlp, snapshot, train, wide

KINDS = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {}),
    "bf16 split": (torch.bfloat16, {"bf16_update": "split"}),
    "bf16 stochastic": (torch.bfloat16, {"bf16_update": "stochastic"}),
}
kinds = pytest.mark.parametrize(("dtype", "options"), KINDS.values(), ids=KINDS.keys())
EIGHT_BITS = {
    "8 bits, clipped": (torch.float32, {"optim_bits": 8, "max_grad_norm": 0.1}),
    "8 bits, bf16 split": (torch.bfloat16, {"optim_bits": 8}),
    "8 bits, bf16 stochastic": (torch.bfloat16, {"optim_bits": 8, "bf16_update": "stochastic"}),
}


def build(dtype=torch.float32, seed=3, **options):
    model = (wide if "optim_bits" in options else mlp)(dtype, seed)
    torch.manual_seed(seed)
    return model, MoLF(model, **{"ranks": (2, 3), "lr": 1e-3, "lora_lr": 3e-3, **options})


def through_a_file(*objects):
    file = io.BytesIO()
    torch.save([o.state_dict() for o in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("dtype", "options"), (KINDS | EIGHT_BITS).values(), ids=KINDS | EIGHT_BITS)
@pytest.mark.parametrize(("steps", "top_k"), [(0, 1), (1, 2), (3, 1), (3, 2)])
def test_interrupted_and_resumed_is_uninterrupted(dtype, options, steps, top_k):
    model, optimizer = build(dtype, top_k=top_k, **options)
    scheduler = CosineAnnealingLR(optimizer, 12)
    train(model, optimizer, steps, scheduler)
    saved = through_a_file(model, optimizer, scheduler)

    resumed, other = build(dtype, seed=99, top_k=top_k, **options)
    train(resumed, other, steps)  # what is there is replaced
    other_scheduler = CosineAnnealingLR(other, 12)
    for o, state in zip((resumed, other, other_scheduler), saved, strict=True):
        o.load_state_dict(state)
    rest = range(steps, steps + 4)
    assert train(model, optimizer, rest, scheduler) == train(resumed, other, rest, other_scheduler)
    assert_same_bits(model, optimizer, resumed, other)
    for group, own in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in own.items() if k != "params"}


@kinds
def test_state_comes_back_in_its_own_dtypes(dtype, options):
    model, optimizer = build(dtype, **options)
    train(model, optimizer, 3)
    resumed, other = build(dtype, seed=99, **options)
    other.load_state_dict(through_a_file(optimizer)[0])
    resumed.load_state_dict(model.state_dict())
    assert_same_bits(model, optimizer, resumed, other)
    master = torch.float64 if dtype == torch.float64 else torch.float32
    for state in other.state.values():
        for key, value in state.items():
            want = {"low": torch.int16}.get(key, master) if value.ndim else torch.float32  # counts are single numbers
            assert value.dtype == want, key
    assert any("low" in state for state in other.state.values()) == (options.get("bf16_update") == "split")


LINEAR = nn.Linear(12, 5, bias=False)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({5: nn.Linear(5, 4)}, r"5 is \[4, 5\] here and \[3, 5\] in the state"),
        ({0: nn.Embedding(12, 7)}, r"0\.weight is \[12, 7\] here and \[11, 7\] in the state"),
        ({1: nn.Linear(7, 12), 3: nn.LayerNorm(12), 4: LINEAR}, r"13.* in the state"),
        ({4: nn.Linear(13, 5)}, "4 has 1 parameters in the state and 2 here. Freeze and unfreeze the same"),
        (
            {6: nn.Linear(3, 3)},
            r"3 routed modules, this optimizer has 4; missing in the state: \['6'\], unknown here: none",
        ),
    ],
    ids=["wider", "larger vocabulary", "other middle", "extra bias", "extra layer"],
)
def test_state_of_another_model(layers, words):
    model, optimizer = build()
    train(model, optimizer, 1)
    other_model = mlp(torch.float32)
    for i, layer in layers.items():
        other_model.add_module(str(i), copy.deepcopy(layer))
    other = MoLF(other_model, ranks=(2, 3), lora_lr=3e-3)
    before = snapshot(other_model, other)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(optimizer.state_dict())
    assert not differing(before, snapshot(other_model, other))


@pytest.mark.parametrize(
    ("frozen", "words"),
    [
        (lambda m: m[3], r"outside of routed layers, groups of \[1, 2\] parameters in the state and of \[1\] here"),
        (lambda m: m[3].bias, r"groups of \[1, 2\] parameters in the state and of \[1, 1\] here"),
        (lambda m: m[1].bias, "1 has 2 parameters in the state and 1 here"),
        (lambda m: m[5], r"unknown here: \['5'\]"),
    ],
    ids=["norm", "bias of a norm", "bias", "layer"],
)
def test_state_of_a_run_that_trained_other_parameters(frozen, words):
    model, optimizer = build()
    train(model, optimizer, 1)
    other_model = mlp(torch.float32)
    frozen(other_model).requires_grad_(False)
    other = MoLF(other_model, ranks=(2, 3), lora_lr=3e-3)
    with pytest.raises(MolfError, match=words):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("missing", ["step", "exp_avg", "exp_avg.absmax", "lora_r2.wins", "lora_r3.B.exp_avg_sq"])
def test_a_state_that_is_not_whole(missing):
    model, optimizer = build(optim_bits=8)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    next(own for own in saved["state"].values() if "lora_r2.A" in own).pop(missing)
    before = snapshot(model, optimizer)
    with pytest.raises(MolfError, match=rf"state is not whole: 1 has no {missing}; load what optimizer\.state_dict"):
        optimizer.load_state_dict(saved)
    assert not differing(before, snapshot(model, optimizer))
    for empty in ({}, {"state": {}}):
        with pytest.raises(MolfError, match="this is no optimizer state: it has no '(state|param_groups)'"):
            optimizer.load_state_dict(empty)


@pytest.mark.parametrize("here", ["split", "stochastic"])
def test_low_parts_follow_the_optimizer_that_loads(here):
    model, optimizer = build(torch.bfloat16, bf16_update="stochastic" if here == "split" else "split")
    train(model, optimizer, 2)
    other_model, other = build(torch.bfloat16, bf16_update=here)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert not any("low" in own for own in other.state.values())
    train(other_model, other, range(2, 4))
    assert all(("low" in own) == (here == "split") for own in other.state.values())


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "low", "lora_r2.A", "lora_r3.B", "lora_r3.B.exp_avg_sq"])
def test_every_tensor_of_a_state_must_fit(key):
    model, optimizer = build(dtype=torch.bfloat16)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    entries = next(own for own in saved["state"].values() if "lora_r2.A" in own)
    shape = list(entries[key].shape)
    entries[key] = torch.cat([entries[key], entries[key]])
    with pytest.raises(ValueError, match=r"does not fit: 1.* is " + re.escape(f"{shape} here and [{2 * shape[0]}, ")):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": (2,)}, r"1 has ranks=\(2, 3\) in the state and ranks=\(2,\) here; construct MoLF with"),
        ({"ranks": (3, 2)}, r"ranks=\(2, 3\) in the state and ranks=\(3, 2\)"),
        ({"lora_alpha": 16}, r"scales=\(22\.6.*\) in the state and scales=\(11\.3.*\) here"),
        ({"use_rslora": False}, r"scales=\(22\.6.*\) in the state and scales=\(16\.0.*\) here"),
        ({"target_modules": ["1", "4"]}, r"missing in the state: none, unknown here: \['5'\]"),
        ({"exclude_modules": ["1"]}, r"3 routed modules, this optimizer has 2"),
    ],
    ids=str,
)
def test_state_of_other_experts(options, words):
    model, optimizer = build()
    train(model, optimizer, 1)
    _, other = build(**options)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("saved", "here"),
    [("bf16 stochastic", "bf16 split"), ("float32", "bf16 split"), ("bf16 split", "float32"), ("float64", "float32")],
)
def test_state_of_another_precision_is_refused_or_works(saved, here):
    """It must not load silently and fail in the next step."""
    model, optimizer = build(KINDS[saved][0], **KINDS[saved][1])
    train(model, optimizer, 2)
    other_model, other = build(KINDS[here][0], **KINDS[here][1])
    try:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    except ValueError as error:
        assert "float" in str(error) or "bf16" in str(error)
        return
    train(other_model, other, 1)
    assert all(p.isfinite().all() for p in other_model.parameters())


def test_state_of_plain_adamw_is_refused():
    model = mlp()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    with pytest.raises(ValueError, match="0 routed modules, this optimizer has 3"):
        MoLF(model, ranks=(2,)).load_state_dict(adamw.state_dict())


def test_a_state_that_came_with_lists_for_tuples():
    """As distributed checkpoints send a whole state from rank to rank; afterwards they are tuples again."""
    model, optimizer = build()
    train(model, optimizer, 2)
    groups = [
        {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
        for group in optimizer.state_dict()["param_groups"]
    ]
    assert any(isinstance(group.get("ranks"), list) for group in groups)
    other_model, other = build()
    (state,) = through_a_file(optimizer)
    other.load_state_dict({**state, "param_groups": groups})
    other_model.load_state_dict(model.state_dict())
    for group, as_was in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in as_was.items() if k != "params"}
    for pair in ((model, optimizer), (other_model, other)):
        train(*pair, 2)
    assert_same_bits(model, optimizer, other_model, other)


@kinds
def test_an_optimizer_that_loaded_a_live_state_does_not_share_it(dtype, options):
    model, optimizer = build(dtype, **options)
    train(model, optimizer, 2)
    other_model, other = build(dtype, **options)
    other.load_state_dict(optimizer.state_dict())
    other_model.load_state_dict(model.state_dict())
    before = snapshot(model, optimizer)
    train(other_model, other, 2)
    assert not differing(before, snapshot(model, optimizer))


def test_hooks_see_the_state_that_is_loaded():
    """The state that a pre-hook returns is loaded; a post-hook finds it loaded."""
    model, optimizer = build()
    train(model, optimizer, 2)
    (state,) = through_a_file(optimizer)
    _, other = build()
    seen = []
    later = {key: {**own, "step": own["step"] + 5} for key, own in state["state"].items() if "step" in own}
    changed = {**state, "state": later}
    other.register_load_state_dict_pre_hook(lambda _, given: seen.append(len(given["state"])) or changed)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(len(loaded.state)))
    other.load_state_dict(state)
    assert seen == [len(state["state"]), len(changed["state"])]
    assert {int(own["step"]) for own in other.state.values()} == {7}


def test_the_state_of_a_single_number_goes_where_the_parameter_is():
    """Of CLIP's ``logit_scale``, for example; only counts are on the host, whatever the device."""

    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4))
            self.scale = nn.Parameter(torch.tensor(1.0))

    model = Scaled()
    optimizer = MoLF(model, ranks=(2,))
    (model(torch.ones(2, 3)) * model.scale).sum().backward()
    optimizer.step()
    there = Scaled().to("meta")
    other = MoLF(there, ranks=(2,))
    other.load_state_dict(optimizer.state_dict())
    devices = {key: value.device.type for key, value in other.state[there.scale].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}
    devices = {key: value.device.type for key, value in other.state[there[0].weight].items()}
    assert {key for key, device in devices.items() if device == "cpu"} == {"step", "lora_r2.wins"}

"""The interpreter that kernels are tested in goes on refusing what Triton's own does."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

import triton.language as tl  # noqa: E402

import faster_interpreter  # noqa: E402, F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")


@triton.jit
def combine(x, y, out, what: tl.constexpr):
    at = tl.arange(0, 4)
    one, other = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, one + other if what == "add" else one - other if what == "sub" else one * other)


def combined(one, other, what, dtype):
    x, y = (torch.tensor([1, 2, 3, value], dtype=dtype) for value in (one, other))
    out = torch.empty_like(x)
    combine[(1,)](x, y, out, what)
    return int(out[-1])


@pytest.mark.parametrize(
    ("one", "other", "what"), [(2**31 - 1, 1, "add"), (-(2**31), 1, "sub"), (2**16, 2**15, "mul")], ids=str
)
def test_overflow_is_refused(one, other, what):
    expected = {"add": one + other, "sub": one - other, "mul": one * other}[what]
    assert combined(one, other, what, torch.int64) == expected
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"overflow in {what}"):
        combined(one, other, what, torch.int32)
    assert combined(one // 2, 1, what, torch.int32) == {"add": one // 2 + 1, "sub": one // 2 - 1, "mul": one // 2}[what]

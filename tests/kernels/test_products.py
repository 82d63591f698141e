import pytest
import torch
import triton
import triton.language as tl

from molf.kernels.products import Product, cuts_factors, nearest_tf32, pair_gradients

SHAPES = [(70, 33, 5), (16, 130, 70)]  # out, in, r; r beyond a tile


def rounded(x):
    """The nearest number with 11 significant bits, in float64, by way of arithmetic."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).abs().add(0.5).floor() * mantissa.sign(), exponent - 11)


@triton.jit
def _round(xs, ys, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(ys + at, nearest_tf32(tl.load(xs + at)))


def test_factors_are_rounded_to_what_tensor_cores_hold(tables):
    torch.manual_seed(2)
    x = torch.randn(4096, device=tables.device) * 10.0 ** torch.randint(-9, 9, (4096,), device=tables.device)
    y = torch.empty_like(x)
    _round[(1,)](x, y, N=4096)
    assert torch.equal(y.double(), rounded(x)) and not (y.view(torch.int32) & 0x1FFF).any()
    assert abs(((y.double() - x) / x).mean()) < 3e-5  # cut off they would be 3.5e-4 too small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b_is_nonzero", [0.0, 3.0])
def test_pair_gradients_equal_the_formulas(tables, dtype, b_is_nonzero):
    torch.manual_seed(2)
    made = []
    for out, n_in, r in SHAPES:
        G, A, B = torch.randn(out, n_in), torch.randn(r, n_in), torch.randn(out, r) * (b_is_nonzero > 0)
        tensors = [G.to(dtype), A, B, torch.tensor(b_is_nonzero), torch.full((r, n_in), 9.0), torch.full((out, r), 9.0)]
        G, A, B, count, dA, dB = (x.to(tables.device) for x in tensors)
        made.append(Product(G, A, B, 0.3, count, dA, dB))
    pair_gradients(made, tables)
    for p in made:
        factors = (x.double() for x in (p.G, p.A, p.B))
        G, A, B = map(rounded, factors) if cuts_factors(tables.device) else factors
        torch.testing.assert_close(p.dB, 0.3 * (G @ A.T).float(), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(p.dA, 0.3 * (B.T @ G).float(), rtol=1e-5, atol=2e-5)
        assert b_is_nonzero or not p.dA.any()

import pytest
import torch

from molf.kernels.products import Product, pair_gradients

SHAPES = [(70, 33, 5), (16, 130, 70)]  # out, in, r; r beyond a tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("started", [0.0, 3.0])
def test_pair_gradients_equal_the_formulas(tables, dtype, started):
    torch.manual_seed(2)
    made = []
    for out, n_in, r in SHAPES:
        G, A, B = torch.randn(out, n_in), torch.randn(r, n_in), torch.randn(out, r) * (started > 0)
        tensors = [G.to(dtype), A, B, torch.tensor(started), torch.full((r, n_in), 9.0), torch.full((out, r), 9.0)]
        G, A, B, count, dA, dB = (x.to(tables.device) for x in tensors)
        made.append(Product(G, A, B, 0.3, count, dA, dB))
    pair_gradients(made, tables)
    # On tensor cores products have TF32's 10 bits, the interpreter multiplies in float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if tables.device.type == "cpu" else {"rtol": 2e-3, "atol": 2e-2}
    for p in made:
        torch.testing.assert_close(p.dB, 0.3 * p.G.float() @ p.A.T, **tolerance)
        torch.testing.assert_close(p.dA, 0.3 * p.B.T @ p.G.float(), **tolerance)
        assert started or not p.dA.any()


def test_no_pairs_are_no_work(tables):
    pair_gradients([], tables)

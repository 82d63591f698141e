import pytest
import torch

from molf.kernels.moments import Scalars
from molf.kernels.quantized import score_quantized
from molf.scores import EPD, PFN
from quantized_moments import BETAS, EPS, SHAPES, random_quantized, updated


def entries(device):
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    return [
        random_quantized(device, shape, e, dtype) for e, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True))
    ]


@pytest.mark.parametrize("score", [EPD(), PFN()], ids=lambda s: s.name)
def test_sums_equal_the_formulas_and_nothing_is_written(tables, scalars, score):
    given, before = entries(tables.device), entries(tables.device)
    totals = score_quantized(given, 5, BETAS, EPS, score.name == "pfn", scalars, tables)
    expected = [score.term(*updated(entry, 0.5), EPS).double().sum().item() for entry in before]
    torch.testing.assert_close(totals.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    for one, other in zip(given, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[:5], other[:5], strict=True))


def test_a_skipped_step_adds_nothing(tables, scalars):
    out = Scalars(go=torch.zeros_like(scalars.go), clip=scalars.clip)
    assert not score_quantized(entries(tables.device), 5, BETAS, EPS, False, out, tables).any()

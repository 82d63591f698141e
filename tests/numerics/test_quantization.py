import bitsandbytes.functional as bnb
import pytest
import torch

from molf.numerics.quantization import (
    BLOCK,
    block_count,
    code_values,
    dequantize,
    is_quantizable,
    nearest_code,
    quantize_,
)

CPU = torch.device("cpu")
signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def round_trip(x, signed):
    """Return codes, maxima and the values they stand for."""
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    absmax = torch.zeros(len(x), block_count(x.shape[1]))
    quantize_(x.clone(), codes, absmax, signed)
    return codes, absmax, dequantize(codes, absmax, signed)


def moments(seed, rows=5, n=600, signed=True):
    """Numbers of very different sizes, as moments are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n, generator=generator) * 10 ** (-4 * torch.rand(rows, n, generator=generator))
    return x if signed else x.square()


def nearest_in_plain_loops(x, signed):
    """The oracle: block by block, the closest of all values; a second moment above 0 is never 0."""
    values, result = code_values(signed, CPU).double(), torch.zeros_like(x, dtype=torch.float64)
    for row in range(len(x)):
        for start in range(0, x.shape[1], BLOCK):
            block = x[row, start : start + BLOCK].double()
            there = block.abs().max() * values
            distance = (block[:, None] - there).abs()
            if not signed:
                distance[:, 0].masked_fill_(block > 0, torch.inf)
            result[row, start : start + BLOCK] = there[distance.argmin(1)]
    return result


@signs
def test_values_are_those_of_bitsandbytes(signed):
    torch.testing.assert_close(code_values(signed, CPU), bnb.create_dynamic_map(signed), rtol=1e-6, atol=0)


@signs
def test_tables_find_the_nearest_code(signed):
    values, (lower, starts) = code_values(signed, CPU), nearest_code(signed, CPU)
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (-2.0, 2.0)]
    x = torch.cat([values, middles, *beside, 2 * torch.rand(100_000) - 1, moments(0).flatten().clamp(-1, 1)])
    x = x if signed else x.abs()
    code = lower[(x.view(torch.int32) >> 16) + 32768]
    code = code + (x > starts[code.int()])
    assert torch.equal(code.long(), torch.bucketize(x, middles))


@signs
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600, 768])
def test_round_trip_gives_the_nearest_values(signed, seed, n):
    x = moments(seed, 4, n, signed)
    codes, absmax, back = round_trip(x, signed)
    nearest = nearest_in_plain_loops(x, signed)
    off, least = (back.double() - x).abs(), (nearest - x).abs()
    most = absmax.double().repeat_interleave(BLOCK, 1)[:, :n]
    assert (off <= least + 1e-7 * most).all()
    # Nowhere more than half the widest gap between values.
    values = code_values(signed, CPU)
    assert (off <= most * (values.diff().max() / 2 + 1e-7)).all()
    assert codes.dtype == torch.uint8 and absmax.shape == (4, -(-n // 256))


@signs
def test_round_trip_is_that_of_bitsandbytes(signed):
    """On a CPU it may miss the nearest code of a small number; those only have to be as close."""
    x = moments(1, 16, 1024, signed)
    codes, absmax, back = round_trip(x, signed)
    theirs, state = bnb.quantize_blockwise(x, code=bnb.create_dynamic_map(signed), blocksize=BLOCK)
    assert torch.equal(absmax.flatten(), state.absmax)
    most = absmax.repeat_interleave(BLOCK, 1)
    large = x.abs() > 0.01 * most
    assert (codes == theirs.view_as(codes))[large].double().mean() > 0.99
    off, their_off = ((y - x).abs() for y in (back, bnb.dequantize_blockwise(theirs, state)))
    assert (off <= their_off + 5e-7 * most).all()


@signs
def test_zeros_stay_zeros(signed):
    x = torch.zeros(3, 300)
    x[1, 0] = 2.0
    codes, absmax, back = round_trip(x, signed)
    assert torch.equal(back, x) and absmax.tolist() == [[0, 0], [2, 0], [0, 0]]
    assert torch.equal(dequantize(torch.zeros_like(codes), torch.zeros_like(absmax), signed), torch.zeros(3, 300))


@signs
def test_subnormal_numbers(signed):
    """Nothing overflows where the largest of a block has no finite reciprocal."""
    x = torch.tensor([[1e-41, 5e-42, 0.0, 1e-44], [1e-38, 1e-45, 3e-39, 0.0]])
    back = round_trip(x, signed)[2]
    assert back.isfinite().all()
    torch.testing.assert_close(back, x, rtol=0, atol=1e-40)


def test_a_second_moment_above_zero_never_becomes_zero():
    """Adam divides by its root."""
    x = torch.tensor([[1.0, 1e-12, 1e-38, 0.0]])
    back = round_trip(x, signed=False)[2]
    assert (back[0, :3] > 0).all() and back[0, 3] == 0
    assert back[0, 1] == code_values(False, CPU)[1]


@pytest.mark.parametrize(
    ("shape", "large"), [((64, 64), True), ((63, 65), False), ((5000,), False), ((8, 8, 8, 8), True)], ids=str
)
def test_which_parameters_are_quantizable(shape, large):
    assert is_quantizable(torch.zeros(shape)) is large

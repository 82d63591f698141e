"""Random matrices with 8-bit moments for the tests of the kernels, and the moments that their codes stand for."""

import torch

from molf.numerics.bf16 import split
from molf.numerics.quantization import block_count, dequantize, quantize_
from plans import BETAS, entry

# Rows shorter than a block, of one block, of one and a bit; more dimensions; none.
SHAPES = [(21, 5), (3, 256), (2, 300), (4, 10, 30), (0, 7)]


def random_quantized(device, shape, expert, storage="float", **how):
    """Draw a parameter with moments, and its gradient."""
    generator = torch.Generator().manual_seed(expert)
    g, m, v, value = (torch.randn(shape, generator=generator) for _ in range(4))
    rows, n = shape[0], g[:1].numel() if shape[0] else shape[1]
    codes, maxima = [], []
    for x, signed in ((m, True), (v.square(), False)):
        codes.append(torch.zeros(rows, n, dtype=torch.uint8))
        maxima.append(torch.zeros(rows, block_count(n)))
        quantize_(x.reshape(rows, n), codes[-1], maxima[-1], signed)
    codes, maxima = [x.view(shape).to(device) for x in codes], [x.to(device) for x in maxima]
    high, low = split(value)
    param = (value if storage == "float" else high.clone()).to(device)
    low = low.clone().to(device) if storage == "split" else None
    return entry(param, *codes, expert, low=low, absmax=maxima, **how), g.to(param)


def dequantized(one):
    """Return the two moments as matrices."""
    t = one.tensor
    moments = (t.exp_avg, t.exp_avg_absmax, True), (t.exp_avg_sq, t.exp_avg_sq_absmax, False)
    return [dequantize(x.reshape(len(x), -1) if len(x) else x, absmax, signed) for x, absmax, signed in moments]


def updated(one, grad, clip):
    """Return the two moments after the step, by the formulas."""
    m, v = dequantized(one)
    g = clip * grad.float().reshape(m.shape)
    return m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g

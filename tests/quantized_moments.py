"""Random matrices with 8-bit moments for the tests of the kernels, and the moments that their codes stand for."""

import torch

from molf.kernels.quantized import Quantized
from molf.numerics.quantization import block_count, dequantize, quantize_

BETAS, EPS = (0.9, 0.99), 1e-8
# Rows shorter than a block, of one block, of one and a bit; more dimensions; none.
SHAPES = [(21, 5), (3, 256), (2, 300), (4, 10, 30), (0, 7)]


def random_quantized(device, shape, expert, dtype=torch.float32):
    """Draw a gradient and moments."""
    generator = torch.Generator().manual_seed(expert)
    grad, m, v = (torch.randn(shape, generator=generator) for _ in range(3))
    rows, n = shape[0], grad[:1].numel() if shape[0] else shape[1]
    codes, maxima = [], []
    for x, signed in ((m, True), (v.square(), False)):
        codes.append(torch.zeros(rows, n, dtype=torch.uint8))
        maxima.append(torch.zeros(rows, block_count(n)))
        quantize_(x.reshape(rows, n), codes[-1], maxima[-1], signed)
    codes, maxima = [x.view(shape).to(device) for x in codes], [x.to(device) for x in maxima]
    return Quantized(grad.to(device, dtype), *codes, *maxima, expert)


def dequantized(entry):
    """Return the two moments as matrices."""
    rows = len(entry.exp_avg)
    moments = (entry.exp_avg, entry.exp_avg_absmax, True), (entry.exp_avg_sq, entry.exp_avg_sq_absmax, False)
    return [dequantize(x.reshape(rows, -1) if rows else x, absmax, signed) for x, absmax, signed in moments]


def updated(entry, clip):
    """Return the two moments after the step, by the formulas."""
    m, v = dequantized(entry)
    g = clip * entry.grad.float().reshape(m.shape)
    return m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g

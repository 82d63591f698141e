"""Matrices with 8-bit moments for the tests of the kernels, with the moments they stand for."""

import torch

from molf.kernels.quantized import Quantized
from molf.numerics.quantization import block_count, dequantize, quantize_

BETAS, EPS = (0.9, 0.99), 1e-8
# Rows shorter than a block, of one block, of one and a bit; more dimensions; none.
SHAPES = [(21, 5), (3, 256), (2, 300), (4, 10, 30), (0, 7)]


def drawn(device, shape, expert, dtype=torch.float32):
    """Draw a gradient and moments."""
    generator = torch.Generator().manual_seed(expert)
    grad, m, v = (torch.randn(shape, generator=generator) for _ in range(3))
    rows, n = shape[0], grad[:1].numel() if shape[0] else shape[1]
    made = []
    for x, signed in ((m, True), (v.square(), False)):
        codes, absmax = torch.zeros(rows, n, dtype=torch.uint8), torch.zeros(rows, block_count(n))
        quantize_(x.reshape(rows, n), codes, absmax, signed)
        made.append((codes.view(shape).to(device), absmax.to(device)))
    (m, m_most), (v, v_most) = made
    return Quantized(grad.to(device, dtype), m, v, m_most, v_most, expert)


def opened(packed):
    """Return the two moments as matrices."""
    rows, pairs = (
        len(packed.exp_avg),
        ((packed.exp_avg, packed.exp_avg_absmax), (packed.exp_avg_sq, packed.exp_avg_sq_absmax)),
    )
    return [
        dequantize(codes.reshape(rows, -1) if rows else codes, absmax, signed)
        for (codes, absmax), signed in zip(pairs, (True, False), strict=True)
    ]


def moved(packed, clip):
    """Return the two moments after the step, by the formulas."""
    m, v = opened(packed)
    g = clip * packed.grad.float().reshape(m.shape)
    return m + (1 - BETAS[0]) * (g - m), BETAS[1] * v + (1 - BETAS[1]) * g * g

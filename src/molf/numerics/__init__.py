"""Arithmetic on tensors: AdamW in two phases, bf16 and 8-bit state, gradients, sums over ranks; and what a step needs to know.

Imports no layers.
"""

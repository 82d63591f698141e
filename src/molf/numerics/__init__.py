"""Arithmetic on tensors: AdamW in two phases, bf16 and 8-bit state, gradients, and sums over ranks. Knows no layers."""

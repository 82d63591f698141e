"""The optimizer: one step from gradients to changed weights, its state, and the views that users have of the experts."""

from molf.optimizer.optimizer import MoLF

__all__ = ["MoLF"]

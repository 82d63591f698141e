"""The two ways of holding the experts, by the tag that a parameter group carries."""

from __future__ import annotations

from molf.layers.base import RoutedLayer
from molf.layers.branched import BranchedLayer
from molf.layers.merged import MergedLayer

__all__ = ["FORMS"]

FORMS: dict[str, type[RoutedLayer]] = {"merged": MergedLayer, "branched": BranchedLayer}

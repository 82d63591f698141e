"""The two ways of holding the experts, by the tag that a parameter group carries."""

from __future__ import annotations

from molf.branched import BranchedLayer
from molf.layers import RoutedLayer
from molf.merged import MergedLayer

__all__ = ["FORMS"]

FORMS: dict[str, type[RoutedLayer]] = {"merged": MergedLayer, "branched": BranchedLayer}

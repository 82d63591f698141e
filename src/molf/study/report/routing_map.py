"""The routing of a run as the page's script reads it: shares by layer, for all steps and for every bin of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from molf.study.results.routing import RoutingSummary, depth_of, explained_by_kind, in_order, kind_of


def routing_map(summary: RoutingSummary) -> dict[str, Any]:
    """Return plain JSON values.

    Returns:
        ``modules``, ``experts``, ``kinds``, ``depths``: names. ``kind``, ``depth``: indices by module; ``matrix``: number in a
        stack, or None. ``views``: first and last step of all steps, then of each bin. ``shares`` [experts, views, modules]: share
        of steps won, None where a layer was not logged. ``explained`` [experts, views]: what the kind of projection explains.
    """
    bins = summary.bins
    modules = bins.modules
    of_kind, of_depth = [kind_of(name) for name in modules], [depth_of(name) for name in modules]
    kinds, depths = list(dict.fromkeys(of_kind)), in_order(of_depth)
    views: list[list[Mapping[str, float]]] = []
    for number, expert in enumerate(bins.experts):
        whole = {module: shares[expert] for module, shares in summary.by_module.items()}
        binned = [_logged(modules, view[:, number].tolist()) for view in bins.shares]
        # With one bin, as of a short or an enormous log, it is all there is.
        views.append([whole, *(binned if len(bins.spans) > 1 else [])])
    spans = [(bins.spans[0][0], bins.spans[-1][1]), *(bins.spans if len(bins.spans) > 1 else [])]
    return {
        "modules": modules,
        "experts": bins.experts,
        "kinds": kinds,
        "depths": depths,
        "kind": [kinds.index(name) for name in of_kind],
        "depth": [depths.index(name) for name in of_depth],
        "matrix": [_matrix(name) for name in modules],
        "views": spans,
        "shares": [[[_rounded(view.get(module)) for module in modules] for view in own] for own in views],
        "explained": [[_rounded(explained_by_kind(view)) for view in own] for own in views],
    }


def _logged(modules: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    return {module: share for module, share in zip(modules, shares, strict=True) if not math.isnan(share)}


def _matrix(module: str) -> str | None:
    return module.rpartition("[")[2][:-1] if module.endswith("]") else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

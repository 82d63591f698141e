"""Summary of the routing log of a MoLF run: which experts won."""

import json
import statistics
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from molf.errors import MolfError

ROUTING_FILE = "molf_expert_selection.jsonl"


@dataclass(frozen=True)
class RoutingSummary:
    """Shares of wins, between 0 and 1; those of a layer add up to top_k.

    Attributes:
        steps: The logged steps, in order.
        by_step: Share of layers that an expert won, by expert and step.
        by_module: Share of steps that an expert won, by layer and expert.
    """

    steps: list[int]
    by_step: dict[str, list[float]]
    by_module: dict[str, dict[str, float]]

    def shares(self) -> dict[str, float]:
        """Return each expert's share over all layers and steps."""
        return {expert: sum(series) / len(series) for expert, series in self.by_step.items()}

    def explained_by_kind(self) -> float | None:
        """Return how much of the variance of the layers' ``fft`` share their kind (``q_proj``, ...) explains, between 0 and 1.

        Scores see the shape of a layer as well as the data: near 1, the map says little about the data. None if all are alike.
        """
        kinds: dict[str, list[float]] = defaultdict(list)
        for module, shares in self.by_module.items():
            kinds[kind_of(module)].append(shares.get("fft", 0.0))
        every = [share for own in kinds.values() for share in own]
        total = statistics.pvariance(every)
        if total < 1e-12:
            return None
        within = sum(len(own) * statistics.pvariance(own) for own in kinds.values()) / len(every)
        return 1 - within / total


def kind_of(module: str) -> str:
    """Return the kind of projection of a layer, or of a matrix in a stack: ``up_proj`` of ``layers.3.experts.up_proj[17]``.

    A parameter that is only called ``weight`` is of the kind of its module: ``gate`` of ``layers.3.gate.weight``.
    """
    return module.partition("[")[0].removesuffix(".weight").rpartition(".")[2]


def read_routing(path: Path) -> RoutingSummary:
    """Summarise a routing log.

    If a step was logged twice, as after resuming, the later line counts. At a learning rate of 0, as at the start of a warm-up,
    all scores are 0: such steps decide nothing and are left out, unless all steps are of that kind.

    Raises:
        MolfError: The log is empty, or a line has another format.
    """
    winners: dict[int, dict[str, list[str]]] = {}
    decided: set[int] = set()
    experts: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                selections = entry["selections"]
                winners[entry["step"]] = {name: chosen["winners"] for name, chosen in selections.items()}
                experts.update(*(chosen["scores"] for chosen in selections.values()), *winners[entry["step"]].values())
                if any(score for chosen in selections.values() for score in chosen["scores"].values()):
                    decided.add(entry["step"])
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
                raise MolfError(f"{path}:{number} is not a line of a routing log: {error!r}") from error
    if not winners:
        raise MolfError(f"{path} holds no routed step")
    # Experts that never won have a share of 0.
    names = sorted(experts, key=lambda name: (name != "fft", len(name), name))
    return _summary({step: winners[step] for step in sorted(decided or winners)}, names)


def _summary(winners: dict[int, dict[str, list[str]]], names: list[str]) -> RoutingSummary:
    def shares(decisions: Collection[list[str]]) -> dict[str, float]:
        return {name: sum(name in won for won in decisions) / len(decisions) for name in names}

    steps = [shares(layers.values()) for layers in winners.values()]
    modules = dict.fromkeys(module for layers in winners.values() for module in layers)
    by_module = {
        module: shares([layers[module] for layers in winners.values() if module in layers]) for module in modules
    }
    return RoutingSummary(list(winners), {name: [step[name] for step in steps] for name in names}, by_module)

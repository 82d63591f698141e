"""CounterFact: teach a model counterfactual answers and measure what else changes.

Data set and metrics: K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and Editing Factual Associations in GPT",
NeurIPS 2022. P(target) is the geometric mean of the probabilities of the target's tokens. An edit should raise P(new)
above P(true) for its own prompt (efficacy) and its paraphrases, and keep P(true) above P(new) for prompts about other
subjects (neighborhood).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, cast

import numpy as np

from molf.tasks.base import Answer, Generate, Likelihood, Metric, Request, Row, TargetScores
from molf.tasks.metrics import mean, percentage, statistic
from molf.tasks.sources import Source, SourceTask, UrlFile

MAX_NEW_TOKENS = 16

_FIELDS = {
    "case_id": int,
    "requested_rewrite.prompt": str,
    "requested_rewrite.subject": str,
    "requested_rewrite.target_new.str": str,
    "requested_rewrite.target_true.str": str,
    "paraphrase_prompts": list,
    "neighborhood_prompts": list,
}
_SCORES = ("efficacy_score", "paraphrase_score", "neighborhood_score")


def _problem(row: Row) -> str | None:
    """Return why a record with all its fields still cannot be used, or None."""
    where = f"case_id {row['case_id']}"
    template = row["requested_rewrite"]["prompt"]
    if template.count("{}") != 1:
        return f"{where}: the prompt must contain {{}}, the subject's place, exactly once, found {template!r}"
    for name in ("target_new", "target_true"):
        if not _target(row, name):
            return f"{where}: {name} is empty"
    for field in ("paraphrase_prompts", "neighborhood_prompts"):
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in row[field]):
            return f"{where}: {field} must be a list of non-empty strings, found {row[field]!r}"
    return None


class Fact(SourceTask):
    """The CounterFact benchmark. Training and evaluation use the same rows: the edit itself is measured."""

    name: str = "fact"
    headline: str = "efficacy_score"
    source = Source(
        published=UrlFile("https://rome.baulab.info/data/dsets/counterfact.json", folder="fact"),
        packaged=("counterfact_sample.jsonl.gz",),
        fields=_FIELDS,
        problem=_problem,
    )

    def example(self, row: Row) -> dict[str, str]:
        """Return the edit's prompt and its new answer."""
        return {"prompt": edit_prompt(row), "completion": f" {_target(row, 'target_new')}"}

    def requests(self, row: Row) -> list[Request]:
        """Ask for both targets after every prompt, then for the model's own answer to the edit's prompt."""
        targets = [f" {_target(row, name)}" for name in ("target_new", "target_true")]
        prompts = [edit_prompt(row), *_prompts(row, "paraphrase_prompts"), *_prompts(row, "neighborhood_prompts")]
        likelihoods = [Likelihood(prompt, target) for prompt in prompts for target in targets]
        return [*likelihoods, Generate(edit_prompt(row), MAX_NEW_TOKENS)]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return the metrics of Meng et al. 2022, and three of the edit's prompt alone.

        Metrics are averaged over a record's prompts of one kind, then over the records with such prompts. A tie is not a
        success.

        Returns:
            ``efficacy_score``, ``paraphrase_score``: percentage of prompts with P(new) > P(true).
            ``neighborhood_score``: percentage of prompts with P(true) > P(new).
            ``*_magnitude``: mean difference of the two probabilities in percentage points, positive in the direction that
            the score counts.
            ``score``: harmonic mean of the three scores, 0 if one of them is 0; its n is their smallest.
            ``es_first_token``: ``efficacy_score`` by the targets' first tokens only, over the records where these differ.
            ``exact_new``, ``exact_true``: percentage of records whose greedy continuation, without surrounding white
            space, is exactly that target.
        """
        records = [_read_answers(row, given) for row, given in zip(rows, answers, strict=True)]
        metrics = {
            **_prompt_metrics("efficacy", [[record.edit] for record in records]),
            **_prompt_metrics("paraphrase", [record.paraphrases for record in records]),
            **_prompt_metrics("neighborhood", [[p.swapped() for p in record.neighbors] for record in records]),
        }
        if all(name in metrics for name in _SCORES):
            score = statistic(_harmonic_mean, *zip(*(record.scores() for record in records), strict=True))
            metrics["score"] = replace(score, n=min(metrics[name].n for name in _SCORES))
        first_tokens = [record.edit for record in records if record.edit.first_tokens_differ]
        metrics |= _percentage("es_first_token", [pair.wins_first_token for pair in first_tokens])
        for name in ("new", "true"):
            expected = [_target(row, f"target_{name}") for row in rows]
            exact = [record.generated == target for record, target in zip(records, expected, strict=True)]
            metrics |= _percentage(f"exact_{name}", exact)
        return metrics

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return the three scores of every edit, except those it has no prompts for."""
        records = [_read_answers(row, given) for row, given in zip(rows, answers, strict=True)]
        return [
            {name: value for name, value in zip(_SCORES, record.scores(), strict=True) if not math.isnan(value)}
            for record in records
        ]


def edit_prompt(row: Row) -> str:
    """Return the prompt of the edit, with the subject in its place."""
    rewrite = row["requested_rewrite"]
    # Not str.format: the text may contain other braces.
    return str(rewrite["prompt"]).replace("{}", rewrite["subject"]).strip()


def contradictions(rows: Sequence[Row]) -> int:
    """Return the number of edits whose prompt another edit has with a different new answer.

    No model can satisfy all of these. The published data has 514, for 198 prompts.
    """
    wanted = defaultdict(list)
    for row in rows:
        wanted[edit_prompt(row)].append(_target(row, "target_new"))
    return sum(len(targets) for targets in wanted.values() if len(set(targets)) > 1)


def _target(row: Row, name: str) -> str:
    return str(row["requested_rewrite"][name]["str"]).strip()


def _prompts(row: Row, field: str) -> list[str]:
    return [prompt.strip() for prompt in row[field]]


@dataclass(frozen=True)
class _Pair:
    """The scores of two targets after one prompt; ``wanted`` should win."""

    wanted: TargetScores
    other: TargetScores

    def swapped(self) -> "_Pair":
        return _Pair(self.other, self.wanted)

    @property
    def wins(self) -> bool:
        # Not by probability, which underflows to 0 for two long targets.
        return self.wanted.mean_logprob > self.other.mean_logprob

    @property
    def margin(self) -> float:
        return self.wanted.probability - self.other.probability

    @property
    def first_tokens_differ(self) -> bool:
        return self.wanted.token_ids[0] != self.other.token_ids[0]

    @property
    def wins_first_token(self) -> bool:
        return self.wanted.logprobs[0] > self.other.logprobs[0]


@dataclass(frozen=True)
class _Record:
    """The answers about one row. Every pair wants the new target."""

    edit: _Pair
    paraphrases: list[_Pair]
    neighbors: list[_Pair]
    generated: str

    def scores(self) -> tuple[float, float, float]:
        """Return the percentage of wins for each kind of prompt; NaN for a kind without prompts."""
        return _wins([self.edit]), _wins(self.paraphrases), _wins([pair.swapped() for pair in self.neighbors])


def _read_answers(row: Row, answers: list[Answer]) -> _Record:
    """Group the answers to ``Fact.requests(row)``."""
    paraphrases, neighbors = len(row["paraphrase_prompts"]), len(row["neighborhood_prompts"])
    assert len(answers) == 2 * (1 + paraphrases + neighbors) + 1
    scores, generated = cast(list[TargetScores], answers[:-1]), cast(str, answers[-1])
    pairs = [_Pair(new, true) for new, true in zip(scores[::2], scores[1::2], strict=True)]
    return _Record(pairs[0], pairs[1 : 1 + paraphrases], pairs[1 + paraphrases :], generated.strip())


def _wins(pairs: list[_Pair]) -> float:
    return 100 * fmean(pair.wins for pair in pairs) if pairs else math.nan


def _harmonic_mean(scores: list[np.ndarray]) -> np.ndarray:
    """Return the harmonic mean of three scores' means over the records that have them; 0 if one mean is 0."""
    one, two, three = (np.nansum(s, axis=-1) / np.maximum(1, np.isfinite(s).sum(axis=-1)) for s in scores)
    pairwise = np.asarray(one * two + one * three + two * three)
    means: np.ndarray = np.divide(3 * one * two * three, pairwise, out=np.zeros_like(pairwise), where=pairwise > 0)
    return means


def _prompt_metrics(kind: str, records: list[list[_Pair]]) -> dict[str, Metric]:
    """Return ``{kind}_score`` and ``{kind}_magnitude`` over the records with prompts of this kind."""
    asked = [pairs for pairs in records if pairs]
    if not asked:
        return {}
    return {
        f"{kind}_score": mean([_wins(pairs) for pairs in asked]),
        f"{kind}_magnitude": mean([100 * fmean(pair.margin for pair in pairs) for pairs in asked]),
    }


def _percentage(name: str, outcomes: list[bool]) -> dict[str, Metric]:
    """Return the metric ``name``, or nothing without outcomes."""
    return {name: percentage(outcomes)} if outcomes else {}

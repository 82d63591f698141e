"""CounterFact: teach a model counterfactual answers and measure what else changes.

Data set and metrics: K. Meng, D. Bau, A. Andonian, Y. Belinkov, "Locating and Editing Factual Associations in GPT",
NeurIPS 2022. P(target) is the geometric mean of the probabilities of the target's tokens. An edit should raise P(new)
above P(true) for its own prompt (efficacy) and its paraphrases, and keep P(true) above P(new) for prompts about other
subjects (neighborhood).
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeAlias, cast

import numpy as np

from molf.tasks.base import Answer, Better, Generate, Likelihood, Metric, Request, Row, TargetScores
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
KINDS = ("efficacy", "paraphrase", "neighborhood")
_Pair: TypeAlias = tuple[TargetScores, TargetScores]


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
    metrics: Mapping[str, Better] = {
        **{f"{kind}_{what}": "more" for kind in KINDS for what in ("score", "magnitude")},
        "score": "more",
        "es_first_token": "more",
        "exact_new": "more",
        "exact_true": "less",
    }
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
        records = [_pairs(row, own) for row, own in zip(rows, answers, strict=True)]
        metrics: dict[str, Metric] = {}
        for kind in KINDS:
            asked = [pairs[kind] for pairs in records if pairs[kind]]
            if asked:
                margins = [[wanted.probability - other.probability for wanted, other in pairs] for pairs in asked]
                metrics[f"{kind}_score"] = mean([_wins(pairs) for pairs in asked])
                metrics[f"{kind}_magnitude"] = mean([100 * fmean(own) for own in margins])
        if len(metrics) == 2 * len(KINDS):
            score = statistic(_harmonic_mean, *([_wins(pairs[kind]) for pairs in records] for kind in KINDS))
            metrics["score"] = replace(score, n=min(metrics[f"{kind}_score"].n for kind in KINDS))
        edits = [pair for pairs in records for pair in pairs["efficacy"]]
        differing = [(new, true) for new, true in edits if new.token_ids[0] != true.token_ids[0]]
        if differing:
            metrics["es_first_token"] = percentage(new.logprobs[0] > true.logprobs[0] for new, true in differing)
        if rows:
            generated = [cast(str, own[-1]).strip() for own in answers]
            for name in ("new", "true"):
                targets = [_target(row, f"target_{name}") for row in rows]
                metrics[f"exact_{name}"] = percentage(map(operator.eq, generated, targets))
        return metrics

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[dict[str, Any]]:
        """Return the three scores of every edit, except those it has no prompts for."""
        records = [_pairs(row, own) for row, own in zip(rows, answers, strict=True)]
        return [{f"{kind}_score": _wins(pairs[kind]) for kind in KINDS if pairs[kind]} for pairs in records]


def edit_prompt(row: Row) -> str:
    """Return the prompt of the edit, with the subject in its place."""
    rewrite = row["requested_rewrite"]
    # Not str.format: the text may contain other braces.
    return str(rewrite["prompt"]).replace("{}", rewrite["subject"]).strip()


def true_fact(row: Row) -> str:
    """Return the edit's prompt with the answer that is true."""
    return f"{edit_prompt(row)} {_target(row, 'target_true')}"


def _target(row: Row, name: str) -> str:
    return str(row["requested_rewrite"][name]["str"]).strip()


def _prompts(row: Row, field: str) -> list[str]:
    return [prompt.strip() for prompt in row[field]]


def _pairs(row: Row, answers: list[Answer]) -> dict[str, list[_Pair]]:
    """Return the scores of the wanted and the other target after every prompt, by the prompts' kinds."""
    scores = cast(list[TargetScores], answers[:-1])
    pairs = list(zip(scores[::2], scores[1::2], strict=True))
    paraphrases = 1 + len(row["paraphrase_prompts"])
    assert len(pairs) == paraphrases + len(row["neighborhood_prompts"])
    neighborhood = [(true, new) for new, true in pairs[paraphrases:]]
    return {"efficacy": pairs[:1], "paraphrase": pairs[1:paraphrases], "neighborhood": neighborhood}


def _wins(pairs: list[_Pair]) -> float:
    """Return the percentage of pairs in which the wanted target is more likely; NaN without pairs."""
    # Not by probability, which underflows to 0 for two long targets.
    return 100 * fmean(wanted.mean_logprob > other.mean_logprob for wanted, other in pairs) if pairs else math.nan


def _harmonic_mean(scores: list[np.ndarray]) -> np.ndarray:
    """Return the harmonic mean of three scores' means over the records that have them; 0 if one mean is 0."""
    one, two, three = (np.nansum(s, axis=-1) / np.maximum(1, np.isfinite(s).sum(axis=-1)) for s in scores)
    pairwise = np.asarray(one * two + one * three + two * three)
    means: np.ndarray = np.divide(3 * one * two * three, pairwise, out=np.zeros_like(pairwise), where=pairwise > 0)
    return means

"""Text-to-SQL: write the query that answers a question about tables.

Published data: gretelai/synthetic_text_to_sql (Y. Meyer et al., "Synthetic-Text-To-SQL: A synthetic dataset for training
language models to generate SQL queries from natural language prompts", Gretel, 2024). The sample in the package is from
b-mc2/sql-create-context (2023), whose contexts create tables without rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from molf.tasks.base import Answer, Better, Generate, Metric, Request, Row
from molf.tasks.metrics import percentage, percentage_by
from molf.tasks.sources import HubData, Source, SourceTask

MAX_NEW_TOKENS = 256

Outcome = dict[str, Any]


def _problem(row: Row) -> str | None:
    """Return why a record with all its fields still cannot be used, or None."""
    empty = [field for field in ("sql_prompt", "sql") if not row[field].strip(" \t\r\n;")]
    return f"{empty[0]} is empty" if empty else None


class Sql(SourceTask):
    """The text-to-SQL benchmark."""

    name: str = "sql"
    headline: str = "exact_match"
    metrics: Mapping[str, Better] = {
        "exact_match": "more",
        "logic_match": "more",
        "valid_sql": "more",
        "execution_accuracy": "more",
        "execution_accuracy_filled": "more",
        "bleu": "more",
        "unusable_gold": "less",
    }
    source = Source(
        published=HubData("gretelai/synthetic_text_to_sql"),
        packaged=("sql_create_context_train_sample.jsonl.gz", "sql_create_context_test_sample.jsonl.gz"),
        splits=("train", "test"),
        fields={"sql_prompt": str, "sql_context": str, "sql": str},
        problem=_problem,
    )

    def __init__(self) -> None:
        # score and outcomes are called one after the other, and every query must run only once.
        self._judged: tuple[list[Row], list[list[Answer]], list[Outcome]] | None = None

    def example(self, row: Row) -> dict[str, str]:
        """Return the tables and the question, and the query."""
        return {"prompt": sql_prompt(row), "completion": f" {reference(row)};"}

    def requests(self, row: Row) -> list[Request]:
        """Ask for the query."""
        return [Generate(sql_prompt(row), MAX_NEW_TOKENS, (";",))]

    def score(self, rows: list[Row], answers: list[list[Answer]]) -> dict[str, Metric]:
        """Return the share of correct queries, in several senses.

        Returns:
            ``exact_match``: percentage of queries equal to the reference up to white space, case and a semicolon.
            ``logic_match``: percentage that say the same as the reference, whatever the aliases.
            ``valid_sql``: percentage that run on the record's tables.
            ``execution_accuracy``: percentage with the reference's result, over records with rows in their tables.
            ``execution_accuracy_filled``: the same on made-up rows (``sql_rows``), over records without.
            ``bleu``: corpus BLEU, 0 to 100.
            ``unusable_gold``: the number of records whose reference does not run. They are left out of ``valid_sql`` and
            both ``execution_accuracy``.
            ``exact_match/COMPLEXITY``: ``exact_match`` by ``sql_complexity``, if the data has it.
        """
        from molf.tasks.sql_metrics import corpus_bleu

        outcomes = self.outcomes(rows, answers)
        if not outcomes:
            return {}
        metrics = {name: percentage(outcome[name] for outcome in outcomes) for name in ("exact_match", "logic_match")}
        for name in ("valid_sql", "execution_accuracy", "execution_accuracy_filled"):
            if values := [outcome[name] for outcome in outcomes if name in outcome]:
                metrics[name] = percentage(values)
        metrics["bleu"] = corpus_bleu([outcome["sql"] for outcome in outcomes], [reference(row) for row in rows])
        metrics["unusable_gold"] = Metric(sum("unusable_gold" in outcome for outcome in outcomes), len(rows))
        exact = [outcome["exact_match"] for outcome in outcomes]
        return metrics | percentage_by("exact_match", [row.get("sql_complexity") for row in rows], exact)

    def outcomes(self, rows: list[Row], answers: list[list[Answer]]) -> list[Outcome]:
        """Return for each question the query in the answer, and which metrics it satisfies.

        ``error`` says why a query does not run, ``unusable_gold`` why the reference does not.
        """
        if self._judged is None or self._judged[:2] != (rows, answers):
            texts = [cast(str, text) for (text,) in answers]
            self._judged = (list(rows), [list(own) for own in answers], _judge(rows, texts))
        return self._judged[2]


def sql_prompt(row: Row) -> str:
    """Return the tables, the question about them, and the word before the query."""
    return f"Context:\n{row['sql_context'].strip()}\nQuestion: {row['sql_prompt'].strip()}\nSQL:"


def answered_query(row: Row) -> str:
    """Return the tables, the question and the right query."""
    return f"{sql_prompt(row)} {reference(row)};"


def reference(row: Row) -> str:
    """Return the correct query, without the final semicolon."""
    return str(row["sql"]).strip().rstrip("; \t\r\n")


def _judge(rows: Sequence[Row], texts: Sequence[str]) -> list[Outcome]:
    """Run the references, then the queries whose reference runs, and return the outcomes."""
    # sqlglot is slow to import.
    from molf.tasks.sql_ast import is_ordered, schema_of
    from molf.tasks.sql_metrics import exact_match, extract_sql, logic_match, same_rows
    from molf.tasks.sql_rows import filled_context, has_rows
    from molf.tasks.sql_sandbox import SqlSandbox

    written = [extract_sql(text) for text in texts]
    contexts = [filled_context(row["sql_context"], reference(row)) for row in rows]
    golds = SqlSandbox().execute_many(zip(contexts, map(reference, rows), strict=True))
    usable = [number for number, gold in enumerate(golds) if gold.ok]
    found = iter(SqlSandbox().execute_many((contexts[number], written[number]) for number in usable))
    outcomes = []
    for row, sql, gold in zip(rows, written, golds, strict=True):
        schema, right = schema_of(row["sql_context"]), reference(row)
        outcome = {"sql": sql, "exact_match": exact_match(sql, right), "logic_match": logic_match(sql, right, schema)}
        outcomes.append(outcome)
        if gold.rows is None:
            outcome["unusable_gold"] = gold.error
            continue
        execution = next(found)
        ordered = is_ordered(right, schema)
        name = "execution_accuracy" if has_rows(row["sql_context"]) else "execution_accuracy_filled"
        outcome["valid_sql"] = execution.ok
        outcome[name] = execution.rows is not None and same_rows(execution.rows, gold.rows, ordered=ordered)
        if not execution.ok:
            outcome["error"] = execution.error
    return outcomes

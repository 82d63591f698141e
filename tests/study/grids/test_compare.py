from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from molf.errors import MolfError
from molf.study.config.run_config import RunConfig
from molf.study.grids.compare import Comparison, best, compare
from molf.study.grids.compare_report import markdown, rows_of, write_comparison
from molf.study.grids.spec import FAILED
from molf.study.results.result import write_result
from molf.study.run.selection import load_split
from molf.tasks import Metric, get_task
from small_runs import small_result


@pytest.fixture
def settings():
    return {"model_name_or_path": "somewhere", "sample": True, "limit": 4, "lora_rank": 2}


@pytest.fixture
def comparison(settings, tmp_path):
    """Two methods with two rates each."""
    candidates = {
        method: {
            f"lr{rate:g}": RunConfig.from_dict(settings | {"method": method, "learning_rate": rate}) for rate in rates
        }
        for method, rates in (("fft", (1e-4, 1e-3)), ("lora", (1e-3, 1e-2)))
    }
    return Comparison(candidates, (1, 2), 3, tmp_path / "out")


@dataclass
class Pretended:
    """An engine whose runs train nothing, and do the better the higher their rate. Some may fail or be killed instead."""

    started: list[str] = field(default_factory=list)
    failing: Callable = lambda spec: False
    killed: Callable = lambda spec: False
    metric: str = "efficacy_score"

    def run(self, specs):
        for spec in specs:
            self.started.append(spec.name)
            spec.log_file.write_text("out of cheese")
            if self.failing(spec):
                spec.beside(FAILED).write_text('{"status": 3}')
            elif not self.killed(spec):
                spec.folder.mkdir(exist_ok=True)
                metric = Metric(100 * spec.config.train["learning_rate"] + spec.config.train["seed"], 4)
                config = spec.config.to_dict()
                write_result(spec.folder, small_result(config=config, metrics={self.metric: metric}))
            yield spec


@pytest.fixture
def engine():
    return Pretended()


def test_two_methods_at_two_rates(comparison, engine):
    outcome = compare(comparison, engine)
    assert engine.started[:4] == ["fft-lr0.0001", "fft-lr0.001", "lora-lr0.001", "lora-lr0.01"]
    assert len(engine.started) == 4 + 2 * 2 and (comparison.folder / "selection" / "fft-lr0.001").is_dir()
    assert outcome.metric == "efficacy_score" and not outcome.failures and not outcome.unfinished
    for contender in outcome.contenders:
        assert contender.chosen == best(contender.selection) == list(contender.selection)[1]
        assert [result.config["seed"] for result in contender.results] == [1, 2]
        assert {f"lr{result.config['learning_rate']:g}" for result in contender.results} == {contender.chosen}


def test_an_interrupted_comparison_continues(comparison, engine):
    first = compare(comparison, engine)
    engine.started.clear()
    assert compare(comparison, engine) == first and not engine.started
    lost = comparison.folder / f"lora-{first.contenders[1].chosen}-s2"
    (lost / "result.json").unlink()
    again = compare(comparison, engine)
    assert engine.started == [lost.name]
    assert again.contenders[1].mean(first.metric) == first.contenders[1].mean(first.metric)


def test_selection_never_reads_rows_that_are_evaluated(comparison, engine):
    seen = {True: set(), False: set()}

    def started(spec):
        task, config = get_task("fact"), spec.config.task
        split = load_split(task, config, seed=spec.config.train["seed"])
        seen[config.selection_limit is not None] |= {row["case_id"] for row in split.train + split.eval}

    engine.killed = started
    compare(comparison, engine)
    assert (len(seen[True]), len(seen[False])) == (3, 4) and not seen[True] & seen[False]


def test_settings_of_the_final_runs_alone_do_not_stop_the_choice(settings, tmp_path):
    own = settings | {"validation_limit": 2, "eval_strategy": "epoch", "retention_path": "texts.jsonl"}
    candidates = {"molf": {f"lr{rate}": RunConfig.from_dict(own | {"learning_rate": rate}) for rate in (1e-4, 1e-3)}}
    comparison = Comparison(candidates, (1,), 3, tmp_path / "out")
    for trial in comparison.trials.values():
        task = trial.config.task
        assert (task.selection_limit, task.validation_limit, task.retention_path) == (3, None, None)
    (final,) = comparison.finals("molf", "lr0.001")
    assert (final.config.task.validation_limit, final.config.task.retention_path) == (2, "texts.jsonl")


def test_a_failed_run_is_reported_and_tried_again(comparison, engine):
    engine.failing = lambda spec: spec.name.startswith("lora-") and spec.name.endswith("-s2")
    outcome = compare(comparison, engine)
    (failure,) = outcome.failures
    assert (failure.status, failure.tail) == (3, "out of cheese")
    assert [len(contender.results) for contender in outcome.contenders] == [2, 1]
    assert failure.cell in markdown(outcome)
    engine.failing = lambda spec: False
    engine.started.clear()
    assert not compare(comparison, engine).failures and engine.started == [failure.cell]


def test_methods_that_always_fail(comparison, engine):
    engine.failing = lambda spec: True
    outcome = compare(comparison, engine)
    assert [contender.chosen for contender in outcome.contenders] == [None, None]
    assert len(outcome.failures) == 4
    assert rows_of(outcome)[0]["seeds"] == 0
    assert "| fft | none |" in markdown(outcome)
    write_comparison(outcome, comparison.folder)


def test_nothing_is_chosen_while_a_candidate_is_unfinished(comparison, engine):
    engine.killed = lambda spec: spec.name == "fft-lr0.001"
    outcome = compare(comparison, engine)
    assert outcome.unfinished == ["fft-lr0.001"] and not outcome.failures
    fft, lora = outcome.contenders
    assert fft.chosen is None and list(fft.selection) == ["lr0.0001"] and len(lora.results) == 2


def test_a_run_of_other_settings_is_not_taken_for_this_one(engine, settings, tmp_path):
    one = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft"})}}
    compare(Comparison(one, (1,), 3, tmp_path / "out"), engine)
    other = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft", "limit": 2})}}
    with pytest.raises(MolfError, match=r"fft-lr-s1 holds a run with limit=4 \(here 2\)"):
        compare(Comparison(other, (1,), 3, tmp_path / "out"), engine)


def test_one_candidate_needs_no_choice_and_all_rates_can_be_run(comparison, engine, settings, tmp_path):
    one = {"fft": {"lr": RunConfig.from_dict(settings | {"method": "fft"})}}
    outcome = compare(Comparison(one, (1,), 3, tmp_path / "one"), engine)
    assert len(engine.started) == 1 and outcome.contenders[0].selection == {}
    engine.started.clear()
    two = {"fft": comparison.candidates["fft"]}
    (contender,) = compare(Comparison(two, (1,), 3, tmp_path / "two", all_rates=True), engine).contenders
    assert len(engine.started) == 2 + 2
    assert {contender.chosen, *contender.others} == {"lr0.0001", "lr0.001"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {}}, "nothing to compare"),
        ({"seeds": ()}, "one or more different seeds"),
        ({"seeds": (1, 1)}, "one or more different seeds"),
        ({"selection_limit": 0}, "at least 1"),
    ],
)
def test_no_comparison(comparison, change, message):
    with pytest.raises(MolfError, match=message):
        Comparison(**{**vars(comparison), **change})


def test_different_tasks(settings, tmp_path):
    configs = {task: RunConfig.from_dict(settings | {"task": task}) for task in ("fact", "sql")}
    with pytest.raises(MolfError, match="different tasks"):
        compare(Comparison({"molf": configs}, (1,), 3, tmp_path), Pretended())


def test_an_unknown_metric(comparison, engine):
    with pytest.raises(
        MolfError, match="the task fact has no metric 'nonsense', only efficacy_score, .*; choose one of these$"
    ):
        Comparison(**{**vars(comparison), "metric": "nonsense"})
    with pytest.raises(MolfError, match="the runs that choose settings have no metric 'score', only efficacy_score"):
        compare(Comparison(**{**vars(comparison), "metric": "score"}), engine)


def test_a_metric_that_should_be_small_is_minimised(settings, engine, tmp_path):
    engine.metric = "loss"
    configs = {
        f"lr{rate:g}": RunConfig.from_dict(settings | {"task": "custom", "learning_rate": rate})
        for rate in (1e-4, 1e-3)
    }
    outcome = compare(Comparison({"molf": configs}, (1,), 3, tmp_path / "out", metric="loss"), engine)
    assert outcome.less_is_better and outcome.contenders[0].chosen == "lr0.0001"


def test_the_best_of_some():
    assert best({"a": 2.0, "b": 1.0, "c": 1.0, "d": float("nan")}, less=True) == "b"
    assert best({"a": 1.0, "b": 2.0, "c": 2.0}) == "b"
    assert best({"a": float("nan"), "b": 0.0}) == "b"
    assert best({}) is None

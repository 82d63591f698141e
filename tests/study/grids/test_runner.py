import json
from dataclasses import replace

import pytest

from fake_runs import RESULT, fake_run
from molf.study.grids.local import LocalEngine
from molf.study.grids.runner import check_names, state_of, sweep


@pytest.fixture
def cells(tmp_path):
    return [fake_run(tmp_path / "out", behaviour) for behaviour in ("finish", "fail", "kill")]


def test_one_command_after_another(cells):
    finish, fail, kill = cells
    assert [state_of(cell) for cell in cells] == ["new"] * 3
    told = []
    outcome = sweep(cells, LocalEngine(), tell=told.append)
    assert list(outcome.results) == ["finish"] and outcome.unfinished == ["kill"]
    assert outcome.failures[0].tail.endswith("out of cheese") and outcome.failures[0].status == 3
    assert told[0] == "0 of 3 runs are finished; 3 to run"
    assert f"{fail.folder} failed with status 3" in told
    assert any("kill was interrupted" in line for line in told)
    assert [state_of(cell) for cell in cells] == ["finished", "failed", "interrupted"]

    outcome = sweep(cells, LocalEngine())
    assert list(outcome.results) == ["finish", "kill"] and not outcome.unfinished
    assert outcome.failures[0].tail.endswith("out of cheese")
    assert [len(cell.starts()) for cell in cells] == [1, 1, 2]

    (fail.folder / "mended").touch()
    outcome = sweep(cells, LocalEngine(), retry=True)
    assert list(outcome.results) == ["finish", "fail", "kill"] and not outcome.failures
    assert [len(cell.starts()) for cell in cells] == [1, 2, 2]
    assert outcome == sweep(cells, LocalEngine(), retry=True)


def test_settings_are_written_before_the_run(cells):
    sweep(cells[:1], LocalEngine())
    assert f"output_dir: {cells[0].folder}" in cells[0].settings.read_text()


def test_a_result_of_other_settings_is_not_taken_for_this_one(cells):
    cells[0].folder.mkdir(parents=True)
    (cells[0].folder / "result.json").write_text(json.dumps({**RESULT, "config": {"learning_rate": 1.0}}))
    with pytest.raises(ValueError, match="a run with another learning_rate; remove it"):
        sweep(cells, LocalEngine())
    assert not cells[1].starts()


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(cells):
    kill = cells[2]
    sweep([kill], LocalEngine())
    other = replace(kill, config=replace(kill.config, train=kill.config.train | {"learning_rate": 1.0}))
    with pytest.raises(ValueError, match="checkpoints of a run with another learning_rate; remove it"):
        sweep([other], LocalEngine())
    assert len(kill.starts()) == 1


def test_a_checkpoint_of_another_number_of_processes_is_not_gone_on_from(cells):
    kill = cells[2]
    sweep([kill], LocalEngine())
    (kill.folder / "checkpoint-1" / "made_with.json").write_text('{"processes": 2}')
    with pytest.raises(ValueError, match="a run on 2 processes, and on 1 its .*: go on with --nproc_per_node 2, or"):
        sweep([kill], LocalEngine())
    assert len(kill.starts()) == 1
    assert list(sweep([replace(kill, processes=2)], LocalEngine()).results) == ["kill"]


def test_names_must_differ(cells):
    with pytest.raises(ValueError, match="two runs have the name kill"):
        check_names([*cells, cells[2]])
    with pytest.raises(ValueError, match="nothing to run"):
        sweep([], LocalEngine())

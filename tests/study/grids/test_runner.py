import json
from dataclasses import asdict, replace

import pytest

from fake_runs import RESULT, fake_run
from molf.errors import MolfError
from molf.integrations.checkpoint_folder import UNFINISHED, write_manifest
from molf.study.faults.preemption import Preempted
from molf.study.faults.trained import TRAINED_FILE
from molf.study.grids.local import LocalEngine
from molf.study.grids.runner import check_runs, run_grid
from molf.study.grids.spec import make_spec
from molf.study.run.train import run
from small_runs import small_config, small_run


@pytest.fixture
def specs(tmp_path):
    return [fake_run(tmp_path / "out", behaviour) for behaviour in ("finish", "fail", "kill")]


def test_one_command_after_another(specs):
    finish, fail, kill = specs
    assert [spec.state for spec in specs] == ["new"] * 3
    told = []
    outcome = run_grid(specs, LocalEngine(), log=told.append)
    assert list(outcome.results) == ["finish"] and outcome.unfinished == ["kill"]
    assert outcome.failures[0].tail.endswith("out of cheese") and outcome.failures[0].status == 3
    assert told[0] == "0 of 3 runs are finished; 3 to run"
    assert f"{fail.folder} failed with status 3" in told
    assert any("kill was interrupted" in line for line in told)
    assert [spec.state for spec in specs] == ["finished", "failed", "interrupted"]

    outcome = run_grid(specs, LocalEngine())
    assert list(outcome.results) == ["finish", "kill"] and not outcome.unfinished
    assert outcome.failures[0].tail.endswith("out of cheese")
    assert [len(spec.starts()) for spec in specs] == [1, 1, 2]

    (fail.folder / "mended").touch()
    outcome = run_grid(specs, LocalEngine(), retry=True)
    assert list(outcome.results) == ["finish", "fail", "kill"] and not outcome.failures
    assert [len(spec.starts()) for spec in specs] == [1, 2, 2]
    assert outcome == run_grid(specs, LocalEngine(), retry=True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"status": "3"}', "[" * 10_000])
def test_a_damaged_note_is_one_message(content, specs):
    specs[0].beside(".failed.json").write_text(content)
    with pytest.raises(MolfError, match=r"finish.failed.json is damaged: .*; remove it to run finish again"):
        run_grid(specs, LocalEngine())
    specs[0].beside(".failed.json").write_text('{"status": 3}')
    assert specs[0].failure.status == 3 and specs[0].failure.tail == "", "its log may be gone"


@pytest.mark.parametrize(
    "content", ["{", "- 1", "\x00", "a: " + "9" * 5000, "run_name: finish\noutput_dir: x\nlimit: seven"], ids=range(5)
)
def test_damaged_settings_are_one_message(content, specs):
    (specs[0].folder / "checkpoint-1").mkdir(parents=True)
    specs[0].settings_file.write_text(content)
    with pytest.raises(
        MolfError, match=r"finish.yaml is damaged|the settings of the earlier run are not those of a run"
    ):
        run_grid(specs, LocalEngine())


@pytest.mark.parametrize(
    "content", ["", "task: custom\nlearning_rate: [1e-4, 1e-5]\n", "methods: [finish]\n", "run_name: x"]
)
@pytest.mark.parametrize("resumable", [False, True])
def test_a_settings_file_of_the_user_is_not_replaced(content, resumable, specs):
    if resumable:
        (specs[1].folder / "checkpoint-1").mkdir(parents=True)
    specs[1].settings_file.write_text(content)
    with pytest.raises(MolfError, match=r"fail\.yaml is (not|damaged).* settings file of an earlier run"):
        run_grid(specs, LocalEngine())
    assert specs[1].settings_file.read_text() == content
    assert not specs[0].settings_file.exists(), "nothing is written if one run is refused"


def test_files_of_the_user_in_the_folder_of_a_run_are_named_and_kept(specs):
    specs[1].folder.mkdir()
    for name in ("README.md", "model.safetensors", "notes.txt"):
        (specs[1].folder / name).write_text("mine")
    with pytest.raises(MolfError, match=r"fail holds README\.md, model\.safetensors, which no run wrote"):
        run_grid(specs, LocalEngine())
    assert (specs[1].folder / "model.safetensors").read_text() == "mine" and not specs[0].starts()


def test_a_broken_symlink_for_a_result_is_not_run_over(specs):
    specs[0].folder.mkdir()
    (specs[0].folder / "result.json").symlink_to("gone")
    with pytest.raises(MolfError, match=r"result\.json is a broken symlink to gone"):
        run_grid(specs, LocalEngine())
    assert not specs[0].starts()


def test_settings_are_written_before_the_run(specs):
    run_grid(specs[:1], LocalEngine())
    assert f"output_dir: {specs[0].folder}" in specs[0].settings_file.read_text()


def test_a_result_of_other_settings_is_not_taken_for_this_one(specs):
    specs[0].folder.mkdir(parents=True)
    (specs[0].folder / "result.json").write_text(json.dumps({**RESULT, "config": {"learning_rate": 1.0}}))
    with pytest.raises(
        MolfError, match=r"finish holds a run with learning_rate=1.0 \(here 5e-05\); use the same settings"
    ):
        run_grid(specs, LocalEngine())
    assert not specs[1].starts()
    with pytest.raises(MolfError, match="finish holds a run with"):
        check_runs(specs)


def test_what_a_dry_run_checks_leaves_nothing(specs, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    assert check_runs(specs) == specs
    assert sorted(tmp_path.rglob("*")) == before


def with_settings(spec, **settings):
    return replace(spec, config=replace(spec.config, train=spec.config.train | settings))


@pytest.mark.parametrize("left", ["checkpoint-1", f"{UNFINISHED}/checkpoint-3", TRAINED_FILE])
def test_a_run_does_not_resume_with_other_settings(specs, left):
    """Whether it left a checkpoint, one that is whole but not in place, or a trained model."""
    spec = specs[0]
    spec.write_settings()
    path = spec.folder / left
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if left == TRAINED_FILE else path.mkdir()
    if UNFINISHED in left:
        write_manifest(path)
    with pytest.raises(MolfError, match=r"finish holds an unfinished run with learning_rate=5e-05 \(here 1.0\)"):
        run_grid([with_settings(spec, learning_rate=1.0)], LocalEngine())
    assert not spec.starts()
    assert list(run_grid([with_settings(spec, save_steps=7)], LocalEngine()).results) == ["finish"]


def test_a_run_that_left_nothing_may_start_with_other_settings(specs):
    fail = specs[1]
    run_grid([fail], LocalEngine())
    (fail.folder / "mended").touch()
    assert run_grid([with_settings(fail, learning_rate=1.0)], LocalEngine(), retry=True).results


def test_a_run_does_not_resume_on_another_number_of_processes(specs):
    kill = specs[2]
    run_grid([kill], LocalEngine())
    (kill.folder / "checkpoint-1" / "made_with.json").write_text('{"processes": 2}')
    with pytest.raises(MolfError, match=r"an unfinished run with nproc_per_node=2 \(here 1\)"):
        run_grid([kill], LocalEngine())
    assert len(kill.starts()) == 1
    assert list(run_grid([replace(kill, processes=2)], LocalEngine()).results) == ["kill"]


def test_names_must_differ(specs):
    with pytest.raises(MolfError, match="two runs have the name kill"):
        check_runs([*specs, specs[2]])
    with pytest.raises(MolfError, match="nothing to run"):
        run_grid([], LocalEngine())


class InProcess:
    """An engine that carries out real runs in this process, which is quicker."""

    def run(self, specs):
        for spec in specs:
            run(spec.config)
            yield spec


def test_a_run_that_is_stopped_in_its_evaluation_is_not_trained_again(saved_model, tmp_path, monkeypatch):
    spec = make_spec(tmp_path / "out", "run", small_config(small_run(saved_model, tmp_path)))
    assert spec.config.train["save_strategy"] == "no"

    def stopped(*given, **settings):
        raise Preempted("stopped in its evaluation")

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr("molf.study.run.train.evaluate", stopped)
        run(spec.config)
    trained = json.loads((spec.folder / TRAINED_FILE).read_text())["training"]
    outcome = run_grid([spec], InProcess())
    assert asdict(outcome.results["run"].training) == trained, "to the second"

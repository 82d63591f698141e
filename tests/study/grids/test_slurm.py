import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from fake_runs import fake_run, until
from molf.errors import MolfError
from molf.integrations.checkpoint_folder import checkpoints
from molf.study.grids.runner import run_grid
from molf.study.grids.slurm import SlurmEngine, SlurmSettings, job_of, largest_array, queued_jobs

TESTS = Path(__file__).parents[2]


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch):
    """Sweep specs on the cluster, whose jobs find the specs' class."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)

    def run(specs, wait=True, retry=False, **settings):
        told = []
        settings = SlurmSettings(time=5, cpus_per_task=1, **settings)
        engine = SlurmEngine(tmp_path / "jobs", settings, wait=wait, log=told.append)
        return run_grid(specs, engine, retry=retry, log=told.append), told

    return run


def slurm(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_more_runs_than_an_array_may_have_of_which_two_break_off(submit, tmp_path):
    behaviours = ["finish", "fail", "kill", "finish", "finish"]
    specs = [fake_run(tmp_path / "out", name, f"run{number}") for number, name in enumerate(behaviours)]
    outcome, told = submit(specs)
    assert list(outcome.results) == ["run0", "run3", "run4"] and outcome.unfinished == ["run2"]
    assert [failure.status for failure in outcome.failures] == [3]
    arrays = [job_of(spec).partition("_")[0] for spec in specs]
    assert arrays == [arrays[0]] * largest_array() + [arrays[-1]] and arrays[0] != arrays[-1]
    assert [line.split(",")[0] for line in told if "submitted" in line] == ["submitted 4 jobs", "submitted 1 jobs"]
    (specs[1].folder / "mended").touch()
    outcome, told = submit(specs, retry=True)
    assert len(outcome.results) == 5
    assert specs[2].starts() == [False, True] and len(specs[0].starts()) == 1


def test_a_job_in_the_queue_is_not_submitted_again(submit, tmp_path):
    spec = fake_run(tmp_path / "out", "hold")
    outcome, _ = submit([spec], wait=False)
    job = job_of(spec)
    assert outcome.unfinished == ["hold"] and job in queued_jobs()
    (submitted,) = (tmp_path / "jobs").glob("*submitted.pkl")
    assert DelayedSubmission.load(submitted)._timeout_countdown == 10_000, "it comes back however long it takes"
    until(spec.starts)
    _, told = submit([spec], wait=False)
    assert "1 jobs are in the queue already" in told and job_of(spec) == job
    slurm("scancel", job)
    until(lambda: job not in queued_jobs())
    assert checkpoints(spec.folder), spec.log_file.read_text()  # a cancelled job saves, and does not come back
    outcome, _ = submit([spec])
    assert list(outcome.results) == ["hold"] and spec.starts() == [False, True]


def test_a_job_whose_time_is_up_saves_and_comes_back(submit, tmp_path):
    spec = fake_run(tmp_path / "out", "hold")
    submit([spec], wait=False)
    until(spec.starts)
    slurm("scancel", "--signal=USR1", job_of(spec))  # what `#SBATCH --signal` sends before the limit
    until(lambda: spec.state == "finished")
    outcome, _ = submit([spec])
    assert list(outcome.results) == ["hold"] and spec.starts() == [False, True]


def test_a_job_that_makes_room_for_another_goes_on(submit, tmp_path):
    spec = fake_run(tmp_path / "out", "hold")
    submit([spec], wait=False, signal_delay_s=2)
    until(spec.starts)
    urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true"]
    assert "Submitted" in slurm(*urgent)
    until(lambda: spec.state == "finished")  # nobody but SLURM and the job itself brings it back
    outcome, _ = submit([spec])
    assert list(outcome.results) == ["hold"] and spec.starts() == [False, True]


def test_what_slurm_refuses(submit, tmp_path):
    spec = fake_run(tmp_path / "out", "finish")
    with pytest.raises(MolfError, match="SLURM refuses the jobs.*invalid partition"):
        submit([spec], partition="nowhere")
    assert job_of(spec) is None and not spec.starts()


@pytest.mark.parametrize(("gpus", "processes"), [(1, 4), (4, 1)])
def test_another_number_of_gpus_than_processes(gpus, processes, tmp_path):
    spec = replace(fake_run(tmp_path, "finish"), processes=processes)
    engine = SlurmEngine(tmp_path / "jobs", SlurmSettings(gpus_per_node=gpus))
    with pytest.raises(MolfError, match=f"--gpus_per_node {gpus}, and --nproc_per_node {processes} needs one GPU per"):
        next(engine.run([spec]))


def test_no_slurm_here(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MolfError, match="there is no sbatch here.*--engine local"):
        next(SlurmEngine(tmp_path / "jobs").run([fake_run(tmp_path, "finish")]))


def test_a_silent_controller_is_no_empty_queue(tmp_path, monkeypatch):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    for program in ("sbatch", "srun", "scontrol"):
        (tmp_path / program).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queued_jobs() is None
    with pytest.raises(MolfError, match="squeue does not answer"):
        next(SlurmEngine(tmp_path / "jobs").run([fake_run(tmp_path, "finish")]))
    with pytest.raises(MolfError, match="scontrol does not say how large an array may be"):
        largest_array()


@pytest.mark.parametrize("name", ["time", "array_parallelism", "signal_delay_s"])
def test_impossible_settings(name):
    with pytest.raises(MolfError, match=f"{name}=0 must be at least 1"):
        SlurmSettings(**{name: 0})


def test_what_a_job_asks_for():
    settings = SlurmSettings(partition="gpu", gpus_per_node=1, setup=["module load cuda"], sbatch={"nice": 5})
    assert settings.parameters() == {
        "partition": "gpu",
        "time": 60,
        "gpus_per_node": 1,
        "array_parallelism": 256,
        "setup": ["module load cuda"],
        "additional_parameters": {"nice": 5, "signal": "SIGUSR1@120"},
    }


@pytest.mark.parametrize(
    "place", ["a\ntouch owned", "100%", "%j", "back\\slash", "tab\t", "line\u2028", "a\rb"], ids=ascii
)
def test_a_folder_that_sbatch_would_misread_is_refused(place, tmp_path, monkeypatch):
    with pytest.raises(MolfError, match="SLURM's files cannot be in .*; choose another output_root"):
        SlurmEngine(tmp_path / place / "jobs")
    monkeypatch.chdir((tmp_path / place).mkdir() or tmp_path / place)
    with pytest.raises(MolfError, match="cannot be in"):
        SlurmEngine(Path("jobs"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sbatch": {"nice\ntouch owned": 1}}, "the name of an option"),
        ({"sbatch": {"a b": 1}}, "the name of an option"),
        ({"sbatch": {3: 1}}, "the name of an option"),
        ({"sbatch": {"": 1}}, "the name of an option"),
        ({"sbatch": {"comment": "a\ntouch owned"}}, "a value is"),
        ({"sbatch": {"comment": ["a"]}}, "a value is"),
        ({"sbatch": {"comment": None}}, "a value is"),
        ({"sbatch": {"requeue": False}}, "a value is"),
        ({"sbatch": {"signal": "USR2@5"}}, "use signal_delay_s"),
        ({"sbatch": {"array": "0-9"}}, "use array_parallelism"),
        *(({name: "x\ntouch owned"}, "a value is") for name in ("partition", "account", "qos", "constraint")),
    ],
    ids=ascii,
)
def test_what_would_be_another_line_of_the_script_is_refused(settings, words):
    with pytest.raises(MolfError, match=words):
        SlurmSettings(**settings)


@pytest.mark.parametrize("content", ["", "{}", '{"job": 1}', "[]"])
def test_a_damaged_note_of_a_job_is_one_message(content, tmp_path):
    spec = fake_run(tmp_path / "out", "finish")
    spec.beside(".job.json").write_text(content)
    with pytest.raises(MolfError, match=r"finish.job.json is damaged: .*; remove it once no job"):
        job_of(spec)


def test_options_of_sbatch():
    options = {"nice": 5, "exclusive": True, "mail-user": "me@here", "comment": "it's $(not) run; 100 %", "x_y": 0.5}
    assert SlurmSettings(sbatch=options).parameters()["additional_parameters"].items() >= options.items()

import shlex

import pytest
import yaml

from molf.cli.grid import GridOptions, as_list, configs, read_grid
from molf.cli.sweep import SweepOptions
from molf.errors import UsageError
from molf.study.faults.preemption import Preempted


@pytest.fixture
def methods_of(tmp_path):
    """Return the methods that a file's ``methods`` and flags stand for."""

    def read(in_file, flags=""):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"methods": in_file}))
        return read_grid([str(tmp_path / "grid.yaml"), *shlex.split(flags)], GridOptions)[0]

    return read


def test_methods_of_files_and_flags(methods_of):
    assert methods_of(["fft", "lora"]) == {"fft": {"method": "fft"}, "lora": {"method": "lora"}}
    own = {"small": {"method": "lora"}, "fft": None}
    assert methods_of(own) == {"small": {"method": "lora"}, "fft": {"method": "fft"}}
    assert methods_of(own, "--methods fft --methods small molf") == {
        "small": {"method": "lora"}, "molf": {"method": "molf"}
    }  # fmt: skip
    with pytest.raises(UsageError, match="methods must be a list"):
        methods_of("fft")


def grid_of(tmp_path, line="", **content):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return read_grid([str(tmp_path / "grid.yaml"), *shlex.split(line)], GridOptions)[0]


def test_a_flag_may_be_negated(tmp_path):
    assert grid_of(tmp_path, "--no_retention --seed 1 2", methods=["fft"]) == {
        "fft": {"method": "fft", "retention": False, "seed": ["1", "2"]}
    }
    assert read_grid(["--methods", "fft", "--no-wait"], SweepOptions)[1].wait is False


def test_a_shared_setting_is_for_the_methods_that_read_it(tmp_path):
    shared = {"lora_rank": 8, "ranks": [[2], [4]], "learning_rate": 1e-4, "target_modules": ["q_proj"]}
    found = grid_of(tmp_path, "--top_k 2", methods=["fft", "lora", "molf"], optim="sgd", **shared)
    common = {"learning_rate": 1e-4}
    assert found == {
        "fft": {"method": "fft", **common, "optim": "sgd"},
        "lora": {"method": "lora", **common, "lora_rank": 8, "target_modules": ["q_proj"], "optim": "sgd"},
        "molf": {"method": "molf", **common, "ranks": [[2], [4]], "target_modules": ["q_proj"], "top_k": "2"},
    }
    frozen = grid_of(tmp_path, methods=["fft"], target_modules=["q_proj"], freeze_non_linear=True)["fft"]
    assert frozen["target_modules"] == ["q_proj"], "then it is read"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"methods": ["fft"], "lora_rank": 8}, "method fft does not read lora_rank=8"),
        ({"methods": ["fft", "lora"], "top_k": 2}, "method fft does not read top_k=2"),
        ({"methods": {"fft": {"lora_rank": 8}, "lora": None}}, "method fft does not read lora_rank=8"),
        (
            {"methods": {"mine": {"method": "molf", "optim": "sgd"}, "lora": None}},
            "method molf does not read optim=sgd",
        ),
        ({"methods": ["ffft", "lora"], "top_k": 2}, "invalid choice: 'ffft'"),
    ],
)
def test_a_setting_that_no_method_reads_or_that_is_given_to_one_that_does_not_is_refused(content, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        for name, settings in grid_of(tmp_path, **content).items():
            list(configs(name, settings, {}))


@pytest.mark.parametrize(
    ("line", "words"),
    [("--engine local", "the runs have saved what they could"), ("--engine slurm", "the jobs stay in the queue")],
)
def test_an_interruption_says_what_becomes_of_the_runs(line, words):
    _, options = read_grid(shlex.split(line), GridOptions)
    with pytest.raises(Preempted) as stopped, options.interruptible():
        raise KeyboardInterrupt
    assert stopped.value.message == f"interrupted; {words}, and the same command continues"


def test_all_combinations_in_order():
    grid = {"learning_rate": ["1e-4", 1e-3], "seed": [1, 2]}
    found = [(config.train["learning_rate"], config.train["seed"]) for config in configs("x", {"method": "fft"}, grid)]
    assert found == [(1e-4, 1), (1e-4, 2), (1e-3, 1), (1e-3, 2)]
    with pytest.raises(UsageError, match="in the settings of x; did you mean 'learning_rate'"):
        list(configs("x", {"learning_rte": 1}, {}))


def test_values():
    assert as_list("[1, 2]") == as_list("1,2") == ["1", "2"]
    assert as_list((1, 2)) == as_list([1, 2]) == [1, 2] and as_list(3) == [3]


@pytest.mark.parametrize("given", ["lora", 5, ["lora"], {5: 1}], ids=str)
def test_the_settings_of_a_method_are_a_mapping(methods_of, given):
    with pytest.raises(UsageError, match=r"methods: a must have a mapping of setting to value, such as .*, not "):
        methods_of({"a": given})


def test_an_axis_without_values_is_named():
    with pytest.raises(UsageError, match="learning_rate of fft is an empty list: give it one or more values"):
        list(configs("fft", {"method": "fft"}, {"seed": [1], "learning_rate": []}))

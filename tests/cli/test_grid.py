import pytest

from molf.cli.grid import as_list, configs, contenders
from molf.errors import UsageError


def test_contenders_of_files_and_flags():
    assert contenders(["fft", "lora"], []) == {"fft": {}, "lora": {}}
    own = {"small": {"method": "lora"}, "fft": None}
    assert contenders(own, []) == {"small": {"method": "lora"}, "fft": {}}
    assert contenders(own, [["fft"], ["small", "molf"]]) == {"small": {"method": "lora"}, "molf": {}}
    with pytest.raises(UsageError, match="methods must be a list"):
        contenders("fft", [])


def test_all_combinations_in_order():
    grid = {"learning_rate": ["1e-4", 1e-3], "seed": [1, 2]}
    found = [(config.train["learning_rate"], config.train["seed"]) for config in configs("x", {"method": "fft"}, grid)]
    assert found == [(1e-4, 1), (1e-4, 2), (1e-3, 1), (1e-3, 2)]
    with pytest.raises(UsageError, match="in the settings of x; did you mean 'learning_rate'"):
        list(configs("x", {"learning_rte": 1}, {}))


def test_values():
    assert as_list("[1, 2]") == as_list("1,2") == ["1", "2"]
    assert as_list((1, 2)) == as_list([1, 2]) == [1, 2] and as_list(3) == [3]

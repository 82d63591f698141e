from types import NoneType
from typing import Any

import pytest

from molf.cli.settings import allows, is_list, setting_types


def test_settings_are_those_of_all_sections_and_of_the_trainer():
    types = setting_types()
    assert types["few_shot"] is int and types["ranks"] == (list[int] | None) and types["learning_rate"] is float
    assert "_argument_group_name" not in types


@pytest.mark.parametrize(
    ("declared", "kind", "allowed"),
    [
        (bool, bool, True),
        (bool | None, bool, True),
        (bool | None, NoneType, True),
        (dict[str, Any] | str | None, dict, True),
        (list[int], list, True),
        (list[int] | None, list, True),
        (int, bool, False),
        (list[int], int, False),
        (None, list, False),
    ],
)
def test_what_a_type_allows(declared, kind, allowed):
    assert allows(declared, kind) is allowed


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        (list[int], True),
        (list[str] | None, True),
        (str | list[str], False),
        (str | list[str] | None, False),
        (int, False),
    ],
)
def test_which_types_are_lists_and_nothing_else(declared, expected):
    assert is_list(declared) is expected

import json
from dataclasses import dataclass
from typing import Any

import pytest

from molf.errors import MolfError
from molf.json_files import read_json, typed


@dataclass(frozen=True)
class Leaf:
    number: float
    word: str | None = None


@dataclass(frozen=True)
class Tree:
    count: int
    leaves: dict[str, Leaf]
    extra: dict[str, Any]
    yes: bool = True
    one: Leaf | None = None


GOOD = {"count": 1, "leaves": {"a": {"number": 2}}, "extra": {"x": [None]}}


def test_values_get_their_types():
    tree = typed(Tree, GOOD | {"one": {"number": 1.5, "word": "w"}})
    assert tree == Tree(1, {"a": Leaf(2.0)}, {"x": [None]}, True, Leaf(1.5, "w"))
    assert isinstance(tree.leaves["a"].number, float)
    assert typed(Tree, GOOD | {"one": None}).one is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "the file must be an object, found a list"),
        (None, "the file must be an object, found null"),
        ({}, "no count, leaves, extra"),
        (GOOD | {"more": 1}, "unknown more"),
        (GOOD | {"count": "1"}, "count must be an integer, found a string"),
        (GOOD | {"count": True}, "count must be an integer, found true or false"),
        (GOOD | {"count": 1.0}, "count must be an integer, found a number"),
        (GOOD | {"yes": 1}, "yes must be true or false, found an integer"),
        (GOOD | {"leaves": []}, "leaves must be an object, found a list"),
        (GOOD | {"leaves": {"a": 3}}, r"leaves\['a'\] must be an object, found an integer"),
        (GOOD | {"leaves": {"a": {}}}, r"no number in leaves\['a'\]"),
        (GOOD | {"leaves": {"a": {"number": "2"}}}, r"leaves\['a'\].number must be a number, found a string"),
        (GOOD | {"one": {"number": None}}, "one.number must be a number, found null"),
    ],
)
def test_other_types_are_named(value, words):
    with pytest.raises(MolfError, match=f"^{words}$"):
        typed(Tree, value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff{}", "not JSON .*utf-8"),
        (b"[" * 10_000, "not JSON|lists and objects are nested"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 lists and objects are nested"),
        (b"[" + b"9" * 5000 + b"]", "not JSON .*digits"),
        (b"[9223372036854775808]", "an integer of more than 64 bits"),
        (rb'{"a": "\ud800"}', r"half of a character, '\\ud800'"),
        (rb'{"\udcff": 1}', "half of a character"),
    ],
)
def test_what_no_file_should_hold_is_one_line(content, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(MolfError, match=words) as raised:
        read_json(file)
    assert "\n" not in str(raised.value)


def test_a_good_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(GOOD | {"extra": {"ü": [2**63 - 1, "\U0001f600", float("inf")]}}))
    assert read_json(file, Tree).extra == {"ü": [2**63 - 1, "\U0001f600", float("inf")]}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")

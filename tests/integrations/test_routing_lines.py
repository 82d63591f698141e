import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from molf import Routing
from molf.integrations.routing_lines import CompactLines, Decoder, PublishedLines, find_log, selection_record
from routing_logs import routing

NAMES = '{"experts":["fft","lora_r2"],"modules":["a.q","a.k"]}\n'


def only(*modules):
    """The decision of some modules, in any order; a new one has the scores of the first."""
    rows = [{"a.q": 0, "a.k": 1}.get(name, 0) for name in modules]
    return replace(routing(), modules=modules, scores=routing().scores[rows], chosen=routing().chosen[rows])


def decoded(*lines):
    decoder = Decoder()
    parts = "".join(lines).splitlines()
    return [found for line in parts if (found := decoder.decode(line.encode(), "log")) is not None]


def test_published_line():
    q = '"a.q": {"winners": ["lora_r2", "fft"], "scores": {"fft": 1.0, "lora_r2": 2.0}}'
    k = '"a.k": {"winners": ["fft"], "scores": {"fft": 0.25, "lora_r2": 0.125}}'
    assert json.dumps(selection_record(3, routing())) == '{"step": 3, "selections": {' + q + ", " + k + "}}"
    assert PublishedLines().encode(3, routing()) == json.dumps(selection_record(3, routing())) + "\n"


def test_compact_lines():
    lines = CompactLines()
    step = '"won":[[1,1],[1,0]],"scores":[[1,0.25],[2,0.125]]}\n'
    assert lines.encode(3, routing()) == NAMES + '{"step":3,' + step
    assert lines.encode(4, routing()) == '{"step":4,' + step
    assert lines.encode(5, only("a.k")) == '{"step":5,"rows":[1],"won":[[1],[0]],"scores":[[0.25],[0.125]]}\n'
    assert lines.encode(6, only("a.k", "b")).startswith(
        '{"experts":["fft","lora_r2"],"modules":["a.q","a.k","b"]}\n{"step":6,"rows":[1,2],'
    )
    assert lines.encode(7, replace(only("a.q"), experts=("fft", "lora_r4"))).startswith(
        '{"experts":["fft","lora_r4"],"modules":["a.q","a.k","b"]}\n{"step":7,"rows":[0],'
    )
    other = CompactLines()
    other.resume(NAMES.encode())
    assert other.encode(4, routing()) == '{"step":4,' + step


@pytest.mark.parametrize("kind", [CompactLines, PublishedLines])
def test_what_is_written_is_read(kind):
    lines, decisions = kind(), [routing(), only("a.k"), only("a.k", "b", "a.q"), routing()]
    found = decoded(*(lines.encode(step, decision) for step, decision in enumerate(decisions, 1)))
    assert [decision.step for decision in found] == [1, 2, 3, 4]
    for one, written in zip(found, decisions, strict=True):
        assert (one.modules, one.experts) == (written.modules, written.experts)
        assert one.won.tolist() == written.chosen.tolist()
        assert one.scores.tolist() == written.scores.tolist()


def test_scores_are_rounded_and_those_that_are_not_finite_are_null():
    scores = torch.tensor([[float("nan"), 1.23456e-9], [float("inf"), 0.0]], dtype=torch.float64)
    line = CompactLines().encode(1, replace(routing(), scores=scores))
    assert line.endswith('"scores":[[null,null],[1.235e-9,0]]}\n')
    (found,) = decoded(line)
    np.testing.assert_array_equal(found.scores, [[np.nan, 1.235e-9], [np.nan, 0.0]])


def test_a_name_may_be_anything():
    name = '}\n"\u2028{"step":1,'
    decision = Routing((name,), ("fft",), torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool))
    for kind in (CompactLines, PublishedLines):
        line = kind().encode(1, decision)
        decoder = Decoder()
        (found,) = [one for part in line.encode().splitlines() if (one := decoder.decode(part, "log"))]
        assert found.modules == (name,)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "null",
        "9" * 5000,
        "[" * 10_000,
        '{"step": 2}',
        '{"step": 2, "won": [[1, 0], [0, 1]]}',
        '{"step": 2, "won": [[1, 0]], "scores": [[1, 2]]}',
        '{"step": 2, "won": [[1], [0]], "scores": [[1], [2]]}',
        '{"step": 2, "won": [[1, 0], [0]], "scores": [[1, 2], [3, 4]]}',
        '{"step": 2, "won": [[1, 0], [0, 1]], "scores": [[1, 2], [3, "4"]]}',
        '{"step": 2, "rows": [2, 0], "won": [[1, 0], [0, 1]], "scores": [[1, 2], [3, 4]]}',
        '{"step": "2", "won": [[1, 0], [0, 1]], "scores": [[1, 2], [3, 4]]}',
        '{"modules": ["a"]}',
        '{"modules": 3, "experts": []}',
        '{"modules": [3], "experts": ["fft"]}',
        '{"modules": "ab", "experts": ["fft"]}',
        '{"modules": ["a"], "experts": [1, 2]}',
        '{"modules": ["a", "a"], "experts": ["fft"]}',
        '{"step": 2, "rows": [-1, 0], "won": [[1, 0], [0, 1]], "scores": [[1, 2], [3, 4]]}',
        '{"step": 2, "selections": {"a": {"winners": [], "scores": {}}}}',
        '{"step": 2, "selections": {"a": {"winners": [5], "scores": {}}}}',
        '{"step": 2, "selections": {"a": 1}}',
        '{"step": "2", "selections": {}}',
        '{"step": 2, "selections": {"a": {"winners": "fft", "scores": {}}}}',
        '{"step": 2, "selections": {"a": {"winners": ["fft"], "scores": {"fft": "1"}}}}',
    ],
    ids=lambda line: line[:40],
)
def test_another_line_is_refused(line):
    with pytest.raises(ValueError, match="^log:2 is not a line of a routing log: "):
        decoder = Decoder()
        decoder.decode(NAMES.encode(), "log:1")
        decoder.decode(line.encode(), "log:2")


def test_a_step_without_a_header_is_refused():
    with pytest.raises(ValueError, match="no header before the first step"):
        decoded('{"step":1,"won":[[1]],"scores":[[1]]}')


def test_the_log_of_a_folder(tmp_path):
    assert find_log(tmp_path) is None
    for name in ("molf_expert_selection.jsonl", "routing.jsonl"):
        (tmp_path / name).touch()
        assert find_log(tmp_path) == tmp_path / name


def test_a_header_without_experts_has_no_steps():
    with pytest.raises(ValueError, match="no experts.*repair or remove the line"):
        decoded('{"experts":[],"modules":["a"]}\n', '{"step":1,"won":[],"scores":[]}')

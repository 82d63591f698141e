import json

import pytest

from molf.integrations.routing_log import FILE_NAME
from molf.study.results.routing import ROUTING_FILE, RoutingSummary, kind_of, read_routing

LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj")


def write_log(path, *steps):
    """Write a log of (step, winners of the first layer, winners of the second)."""
    lines = []
    for step, *winners in steps:
        selections = {layer: {"winners": won, "scores": {}} for layer, won in zip(LAYERS, winners, strict=True)}
        lines.append(json.dumps({"step": step, "selections": selections}) + "\n")
    path.write_text("".join(lines))
    return path


def test_the_log_is_the_one_that_training_writes():
    assert ROUTING_FILE == FILE_NAME


def test_shares(tmp_path):
    log = write_log(tmp_path / "log", (1, ["fft"], ["lora_r8"]), (2, ["fft"], ["fft"]), (3, ["lora_r8"], ["lora_r8"]))
    summary = read_routing(log)
    assert summary.steps == [1, 2, 3]
    assert summary.by_step == {"fft": [0.5, 1.0, 0.0], "lora_r8": [0.5, 0.0, 1.0]}
    assert summary.by_module[LAYERS[0]] == pytest.approx({"fft": 2 / 3, "lora_r8": 1 / 3})
    assert summary.shares() == pytest.approx({"fft": 0.5, "lora_r8": 0.5})


@pytest.mark.parametrize(
    ("shares", "explained"),
    [((1, 1, 0, 0), 1.0), ((1, 0, 1, 0), 0.0), ((1, 1, 1, 0), 1 / 3), ((1, 1, 1, 1), None)],
    ids=str,
)
def test_how_much_of_the_map_the_kind_of_projection_explains(shares, explained):
    names = ("0.q_proj", "1.q_proj", "0.k_proj", "1.k_proj")
    summary = RoutingSummary([1], {}, {name: {"fft": float(own)} for name, own in zip(names, shares, strict=True)})
    assert summary.explained_by_kind() == (None if explained is None else pytest.approx(explained))


def test_a_step_that_decided_nothing_is_left_out(tmp_path):
    log = write_log(tmp_path / "log", (1, ["fft"], ["fft"]), (2, ["lora_r8"], ["lora_r8"]))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1].replace('"scores": {}', '"scores": {"fft": 1e-9}'))
    assert read_routing(log).steps == [2]


def test_several_winners_count_each(tmp_path):
    log = write_log(tmp_path / "log", (1, ["lora_r16", "fft"], ["lora_r4", "fft"]))
    assert read_routing(log).by_step == {"fft": [1.0], "lora_r4": [0.5], "lora_r16": [0.5]}
    assert list(read_routing(log).by_step) == ["fft", "lora_r4", "lora_r16"]


def test_a_step_logged_again_after_resuming_counts_once(tmp_path):
    log = write_log(tmp_path / "log", (1, ["fft"], ["fft"]), (2, ["fft"], ["fft"]), (2, ["lora_r8"], ["lora_r8"]))
    assert read_routing(log).by_step == {"fft": [1.0, 0.0], "lora_r8": [0.0, 1.0]}


def test_bad_logs_are_refused(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    with pytest.raises(ValueError, match="holds no routed step"):
        read_routing(log)
    write_log(log, (1, ["fft"], ["fft"]))
    for line in (
        b"{",
        b"[]",
        b"\xff",
        b"9" * 5000,
        b"[" * 10_000,
        b'{"step": 2}',
        b'{"step": 2, "selections": {"a": 1}}',
    ):
        log.write_bytes(log.read_bytes().splitlines()[0] + b"\n" + line)
        with pytest.raises(ValueError, match=":2 is not a line of a routing log"):
            read_routing(log)


def test_kinds_of_projections():
    names = ["q_proj", "0.mlp.up_proj[3]", "0.mlp.input_linear.weight[3]", "0.mlp.gate.weight"]
    assert [kind_of(name) for name in names] == ["q_proj", "up_proj", "input_linear", "gate"]

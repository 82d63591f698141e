import json
import tracemalloc

import numpy as np
import pytest

from molf.integrations.routing_log import FILE_NAME
from molf.study.results.routing import ROUTING_FILE, RoutingSummary, kind_of, read_routing
from report_runs import MODULES
from report_runs import write_log as write_made_up

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


def test_layers_that_come_later_have_fewer_bins(tmp_path):
    log, later = tmp_path / "log", tmp_path / "later"
    write_made_up(log, 1, MODULES[:1])
    write_made_up(later, 8)
    log.write_text(log.read_text() + "".join(later.read_text().splitlines(keepends=True)[1:]))
    bins = read_routing(log, max_cells=50).bins
    assert bins.spans == [(1, 2), (3, 4), (5, 6), (7, 8)] and bins.shares.size <= 50
    assert np.isnan(read_routing(log, max_cells=100).bins.shares).sum() == 10, "layers that the first step did not have"


def test_bins_count_consecutive_steps_together(tmp_path):
    write_made_up(tmp_path / "log", 10, wins=lambda step, layer: step <= 5 or layer == 0)
    bins = read_routing(tmp_path / "log", max_cells=3 * len(MODULES) * 2).bins
    assert bins.spans == [(1, 4), (5, 7), (8, 10)]
    assert bins.shares[:, :2, 0].tolist() == [[1.0, 1.0], [1.0, pytest.approx(1 / 3)], [1.0, 0.0]]
    assert bins.scores[2] == pytest.approx([1e-6 * (1 / 8 + 1 / 9 + 1 / 10) / 3, 2e-6 * (1 / 8 + 1 / 9 + 1 / 10) / 3])


def test_a_bin_without_a_decision_is_left_out_and_scores_that_are_not_finite_do_not_count(tmp_path):
    write_made_up(tmp_path / "log", 3)
    first, *others = (tmp_path / "log").read_text().splitlines()
    first = json.loads(first)
    for chosen in first["selections"].values():
        chosen["scores"] = {"fft": 0.0, "lora_r2": 0.0}
    lines = [json.dumps(first), others[0].replace("1e-06", "NaN"), others[1]]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    bins = read_routing(tmp_path / "log").bins
    assert bins.spans == [(2, 2), (3, 3)]
    assert bins.scores[0] == pytest.approx([5e-7, float("nan")], nan_ok=True)
    assert bins.scores[1] == pytest.approx([1e-6 / 3, 2e-6 / 3])


def test_the_summary_of_a_long_log_is_small_and_so_is_the_memory_it_takes(tmp_path):
    """Twice as long a log takes a few more numbers a step, whatever the number of layers."""

    def peak(steps, modules):
        write_made_up(tmp_path / "log", steps, [f"model.layers.{layer}.q_proj" for layer in range(modules)])
        tracemalloc.start()
        summary = read_routing(tmp_path / "log", max_cells=2000)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(summary.steps) == steps and summary.bins.shares.size <= 2000
        return taken

    few, many = (peak(200, modules) for modules in (2, 40))
    more = peak(400, 40)
    assert more - many < 200 * 500, "bytes of 200 steps"
    assert many - few < 500_000


def test_bad_logs_are_refused(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    with pytest.raises(ValueError, match="holds no routed step"):
        read_routing(log)
    log.write_text('{"step": 1, "selections": {}}\n')
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
        b'{"step": "2", "selections": {}}',
        b'{"step": 2, "selections": {"a": {"winners": "fft", "scores": {}}}}',
        b'{"step": 2, "selections": {"a": {"winners": ["fft"], "scores": {"fft": "1"}}}}',
    ):
        log.write_bytes(log.read_bytes().splitlines()[0] + b"\n" + line)
        with pytest.raises(ValueError, match=":2 is not a line of a routing log"):
            read_routing(log)


def test_kinds_of_projections():
    names = ["q_proj", "0.mlp.up_proj[3]", "0.mlp.input_linear.weight[3]", "0.mlp.gate.weight"]
    assert [kind_of(name) for name in names] == ["q_proj", "up_proj", "input_linear", "gate"]

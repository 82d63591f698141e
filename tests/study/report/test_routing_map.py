import json

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from molf.study.report.routing_map import routing_map
from molf.study.results.routing import MAX_BINS, MAX_CELLS, RoutingBins, RoutingSummary
from molf.study.results.routing_reader import read_routing
from report_runs import MODULES, STACKS, write_log


def read(tmp_path, **log):
    write_log(tmp_path / "log", **log)
    summary = read_routing(tmp_path / "log")
    return summary, routing_map(summary)


def test_layers_by_depth_and_kind(tmp_path):
    summary, found = read(tmp_path, steps=4, modules=MODULES + STACKS, wins=lambda step, layer: step > 2 or layer == 0)
    assert found["kinds"] == ["q_proj", "k_proj", "up_proj"] and found["depths"] == ["0", "1", "2"]
    assert found["kind"] == [0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2, 2]
    assert found["depth"] == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]
    assert found["matrix"] == [None] * 6 + ["0", "1"] * 3
    assert found["views"] == [(1, 4), (1, 1), (2, 2), (3, 3), (4, 4)]
    fft, lora = found["shares"]
    assert fft[0] == [1.0] + [0.5] * 11 == [summary.by_module[name]["fft"] for name in found["modules"]]
    assert fft[1] == [1.0] + [0.0] * 11 and fft[4] == [1.0] * 12
    assert all(one + other == 1 for view in range(5) for one, other in zip(fft[view], lora[view], strict=True))


def test_what_the_kind_explains_is_that_of_the_summary(tmp_path):
    summary, found = read(tmp_path, steps=3, wins=lambda step, layer: layer in (0, step))
    assert found["explained"][0][0] == pytest.approx(summary.explained_by_kind(), abs=1e-4)
    _, alike = read(tmp_path, steps=1, wins=lambda step, layer: True)
    assert alike["explained"] == [[None], [None]] and alike["views"] == [(1, 1)]


def test_a_layer_that_was_not_logged_in_a_bin_has_no_share_there(tmp_path):
    write_log(tmp_path / "log", 2)
    header, first, _ = (tmp_path / "log").read_text().splitlines()
    write_log(tmp_path / "short", 2, modules=MODULES[:2])
    short = (tmp_path / "short").read_text().splitlines()[2].replace('"won"', '"rows":[0,1],"won"')
    (tmp_path / "log").write_text(f"{header}\n{first}\n{short}\n")
    summary = read_routing(tmp_path / "log")
    assert routing_map(summary)["shares"][0] == [[1, 0] * 3, [1, 0] * 3, [1, 0] + [None] * 4]


def test_the_largest_map_leaves_room_on_the_page():
    """As many cells as a log of 100,000 steps and 400 layers, or of any other size, is summarised to at most."""
    steps, layers = 100_000, MAX_CELLS // (MAX_BINS * 2)
    names = [f"model.layers.{layer}.mlp.experts.gate_up_proj[{layer}]" for layer in range(layers)]
    shares = np.random.default_rng(0).random((MAX_BINS, layers, 2))
    spans = [(first, first + steps // MAX_BINS - 1) for first in range(1, steps, steps // MAX_BINS)]
    bins = RoutingBins(spans, names, ["fft", "lora_r128"], shares, *[shares.mean(axis=1)] * 2)
    by_module = {name: {"fft": 0.123456, "lora_r128": 0.876544} for name in names}
    found = routing_map(RoutingSummary(steps, {}, by_module, bins))
    assert len(json.dumps(found, separators=(",", ":"))) + len(get_plotlyjs().encode()) < 9e6

import dataclasses
import io
import struct

import numpy as np
import pytest
from rich.console import Console

from molf.study.results.routing import RoutingBins, RoutingSummary
from molf.study.results.tables import draw_routing, metrics_table, routing_pixels, runs_table, share_grid
from molf.tasks.base import Metric
from small_runs import small_result


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "$\\frac{", "$x_$", "a$b$c"])
def test_names_are_shown_as_they_are(name, tmp_path):
    """Brackets are no markup on any console, and dollars no formula in a picture."""
    result = small_result(config={"run_name": name, "method": name, "task": name})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(metrics_table(result))
    console.print(runs_table({name: result}))
    assert console.export_text().count(name) == 4
    draw_routing(routing_of({name: {name: 1.0}}), tmp_path / "x.png", title=name)
    assert (tmp_path / "x.png").stat().st_size > 0


def routing_of(by_module, steps=1):
    """Return a summary in which each expert of the layers won half of them at every step."""
    experts = list(next(iter(by_module.values())))
    shares = np.full((steps, len(by_module), len(experts)), 0.5)
    spans = [(step, step) for step in range(1, steps + 1)]
    bins = RoutingBins(spans, list(by_module), experts, shares, shares[:, 0], shares[:, 0])
    return RoutingSummary(steps, dict.fromkeys(experts, 0.5), by_module, bins)


def shown(table):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(table)
    return console.export_text()


@pytest.fixture
def result():
    return small_result(
        config={"method": "molf", "task": "fact", "run_name": "my run"},
        metrics={"score": Metric(50.0, 12, 40.25, 60.5), "new": Metric(1.5, 4)},
        metrics_before={"score": Metric(75.25, 12, 70.0, 80.0)},
        routing={"fft": 0.25, "lora_r4": 0.75},
    )


def cells(text, name):
    line = next(line for line in text.splitlines() if f" {name} " in line)
    return line.replace("│", " ").split()


def test_metrics_before_and_after(result):
    text = shown(metrics_table(result))
    assert "my run" in text
    assert cells(text, "score") == ["score", "75.25", "(70.00,", "80.00)", "50.00", "(40.25,", "60.50)", "-25.25", "12"]
    assert cells(text, "new") == ["new", "1.50", "4"], "no change where there is nothing to compare with"


def test_metrics_of_an_evaluation(result):
    text = shown(metrics_table(dataclasses.replace(result, metrics_before=None)))
    assert cells(text, "score") == ["score", "50.00", "(40.25,", "60.50)", "12"]
    assert "bootstrap 95 % interval" in text
    assert "before" not in text


def test_runs_side_by_side(result):
    evaluation = dataclasses.replace(result, training=None, routing=None, peak_memory_bytes=None)
    text = shown(runs_table({"one": result, "two": evaluation}))
    assert cells(text, "one") == ["one", "molf", "fact", "score", "50.00", "12", "25%", "801", "1.00", "1.5"]
    assert cells(text, "two") == ["two", "eval", "fact", "score", "50.00", "12", "-", "-", "-", "1.5"]


def test_grid_by_depth_and_projection():
    shares = {
        "model.layers.10.self_attn.q_proj": {"fft": 1.0},
        "model.layers.2.self_attn.q_proj": {"lora_r8": 1.0},
        "model.layers.2.mlp.up_proj": {"fft": 0.25},
        "score_head": {"fft": 0.5},
    }
    grid, depths, kinds = share_grid(shares)
    assert depths == ["2", "10", "-"]
    assert kinds == ["q_proj", "up_proj", "score_head"]
    nan = np.nan
    np.testing.assert_array_equal(grid, [[0.0, 0.25, nan], [1.0, nan, nan], [nan, nan, 0.5]])


def test_layers_of_one_cell_are_averaged():
    grid, _, _ = share_grid({"h.0.experts.a.up": {"fft": 1.0}, "h.0.experts.b.up": {"fft": 0.0}})
    assert grid.tolist() == [[0.5]]


@pytest.mark.parametrize("steps", [1, 50])
def test_the_picture_is_a_whole_png(steps, tmp_path):
    summary = routing_of({f"model.layers.{depth}.self_attn.q_proj": {"fft": 0.5} for depth in range(2)}, steps)
    path = tmp_path / "routing.png"
    draw_routing(summary, path, title="a run")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 300
    assert routing_pixels(summary, title="a run").shape == (height, width, 3)
    assert list(tmp_path.iterdir()) == [path]


def test_names_move_no_cursor_and_need_no_glyph(tmp_path):
    result = small_result(
        config={"run_name": "\x1b[31mred\x9b2J", "task": "\x1b]0;t\x07"}, metrics={"\x1b[2Jm": Metric(1.0, 1)}
    )
    for table in (metrics_table(result), runs_table({"run\x1b[8m": result})):
        assert all(character.isprintable() or character == "\n" for character in shown(table))
    draw_routing(
        routing_of({"a": {"fft": 1.0}}), tmp_path / "drawn.png", "\u5b66\u7fd2\x07"
    )  # warnings are errors here
    assert (tmp_path / "drawn.png").stat().st_size > 0

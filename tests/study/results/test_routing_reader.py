import json
import tracemalloc

import numpy as np
import pytest

from molf.integrations.routing_lines import CompactLines, PublishedLines
from molf.study.results.routing import MAX_BINS
from molf.study.results.routing_reader import RoutingReader, read_routing
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


def test_shares(tmp_path):
    log = write_log(tmp_path / "log", (1, ["fft"], ["lora_r8"]), (2, ["fft"], ["fft"]), (3, ["lora_r8"], ["lora_r8"]))
    summary = read_routing(log)
    assert summary.steps == 3 and summary.bins.spans == [(1, 1), (2, 2), (3, 3)]
    assert summary.bins.experts == ["fft", "lora_r8"]
    assert summary.bins.layers.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert summary.by_module[LAYERS[0]] == pytest.approx({"fft": 2 / 3, "lora_r8": 1 / 3})
    assert summary.shares == pytest.approx({"fft": 0.5, "lora_r8": 0.5})


def test_a_step_that_decided_nothing_is_left_out(tmp_path):
    log = write_log(tmp_path / "log", (1, ["fft"], ["fft"]), (2, ["lora_r8"], ["lora_r8"]))
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1].replace('"scores": {}', '"scores": {"fft": 1e-9}'))
    assert read_routing(log).bins.spans == [(2, 2)]


def test_several_winners_count_each(tmp_path):
    log = write_log(tmp_path / "log", (1, ["lora_r16", "fft"], ["lora_r4", "fft"]))
    assert list(read_routing(log).shares.items()) == [("fft", 1.0), ("lora_r4", 0.5), ("lora_r16", 0.5)]


@pytest.mark.parametrize("again", [1, 2])
def test_a_step_logged_again_is_refused(tmp_path, again):
    log = write_log(tmp_path / "log", (1, ["fft"], ["fft"]), (2, ["fft"], ["fft"]), (again, ["lora_r8"], ["lora_r8"]))
    with pytest.raises(ValueError, match=f"log:3 has step {again} after step 2: keep one line per step"):
        read_routing(log)


def test_both_formats_say_the_same(tmp_path):
    one, other = (tmp_path / kind.__name__ for kind in (CompactLines, PublishedLines))
    for path, kind in ((one, CompactLines), (other, PublishedLines)):
        write_made_up(path, 9, wins=lambda step, layer: (step + layer) % 3 == 0, lines=kind)
    here, there = read_routing(one), read_routing(other)
    assert (here.shares, here.by_module, here.bins.spans) == (there.shares, there.by_module, there.bins.spans)
    np.testing.assert_array_equal(here.bins.shares, there.bins.shares)
    np.testing.assert_allclose(here.bins.scores, there.bins.scores, rtol=1e-3)


def test_a_log_is_read_while_it_is_written(tmp_path):
    write_made_up(tmp_path / "whole", 9)
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    reader = RoutingReader(tmp_path / "log")
    assert not reader.poll() and reader.summary() is None, "there is no file yet"
    for done in ("", lines[0][:9], lines[0]):
        (tmp_path / "log").write_text(done)
        reader.poll()
        assert reader.summary() is None
    (tmp_path / "log").write_text("".join(lines[:4]) + lines[4][:-1])
    assert reader.poll() and reader.summary().steps == 3, "the last line is not complete"
    assert not reader.poll()
    with (tmp_path / "log").open("a") as file:
        file.write("\n" + lines[5])
    assert reader.poll() and reader.summary().steps == 5
    (tmp_path / "log").write_text("".join(lines[:3]))  # a run that resumes
    assert reader.poll() and reader.summary().steps == 2
    (tmp_path / "log").write_text("".join(lines[:3]) + "".join(lines[3:]))
    assert reader.poll() and reader.summary().by_module == read_routing(tmp_path / "whole").by_module


def test_layers_that_come_later_have_fewer_bins(tmp_path):
    log, later = tmp_path / "log", tmp_path / "later"
    write_made_up(log, 1, MODULES[:1])
    write_made_up(later, 8)
    header, _, *lines = later.read_text().splitlines(keepends=True)
    log.write_text(log.read_text() + header + "".join(lines))
    bins = read_routing(log, max_cells=50).bins
    assert bins.spans == [(1, 2), (3, 4), (5, 6), (7, 8)] and bins.shares.size <= 50
    assert np.isnan(read_routing(log, max_cells=100).bins.shares).sum() == 10, "layers that the first step did not have"


def test_bins_count_consecutive_steps_together(tmp_path):
    write_made_up(tmp_path / "log", 10, wins=lambda step, layer: step <= 5 or layer == 0)
    bins = read_routing(tmp_path / "log", max_cells=3 * len(MODULES) * 2).bins
    assert bins.spans == [(1, 4), (5, 8), (9, 10)]
    assert bins.shares[:, :2, 0].tolist() == [[1.0, 1.0], [1.0, 0.25], [1.0, 0.0]]
    assert bins.layers[:, 0] == pytest.approx([1.0, (1 + 3 / 6) / 4, 1 / 6])
    assert bins.scores[2] == pytest.approx([1e-6 * (1 / 9 + 1 / 10) / 2, 2e-6 * (1 / 9 + 1 / 10) / 2], rel=1e-3)
    many = write_made_up(tmp_path / "log", MAX_BINS + 1) or read_routing(tmp_path / "log").bins
    assert len(many.spans) == MAX_BINS // 2 + 1 and many.spans[-1] == (MAX_BINS + 1, MAX_BINS + 1)


def test_a_bin_without_a_decision_is_left_out_and_scores_that_are_not_finite_do_not_count(tmp_path):
    write_made_up(tmp_path / "log", 3, lines=PublishedLines)
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
    """Twice as long a log takes no more of it."""

    def peak(steps, modules):
        write_made_up(tmp_path / "log", steps, [f"model.layers.{layer}.q_proj" for layer in range(modules)])
        tracemalloc.start()
        summary = read_routing(tmp_path / "log", max_cells=2000)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert summary.steps == steps and summary.bins.shares.size <= 2000
        return taken

    peak(50, 40)  # imports and caches
    assert peak(800, 40) - peak(400, 40) < 2_000, "bytes of 400 steps"


def test_bad_logs_are_refused(tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    with pytest.raises(ValueError, match="holds no routed step"):
        read_routing(log)
    log.write_text('{"step": 1, "selections": {}}\n')
    with pytest.raises(ValueError, match="holds no routed step"):
        read_routing(log)
    write_log(log, (1, ["fft"], ["fft"]))
    with log.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match="log:2 is not a line of a routing log"):
        read_routing(log)

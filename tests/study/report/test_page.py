import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from molf.study.report.page import write_page
from molf.study.results.result import read_result
from report_runs import HOSTILE, MODULES, write_run


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.numbers, self.cell, self.text = [], {}, None, ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag == "tr":
            self.metric = None
        if tag == "td":
            self.cell = given
        if tag == "data" and "data-when" in (self.cell or {}):
            key = self.metric, int(self.cell["data-run"]), self.cell["data-when"]
            self.numbers.setdefault(key, []).append(float(given["value"]))

    def handle_data(self, text):
        if self.tags and self.tags[-1][0] in ("script", "style"):
            return
        self.text += text
        if self.tags and self.tags[-1][0] == "th" and text.strip():
            self.metric = text

    @property
    def data(self):
        return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source)[1])


@pytest.fixture
def page(tmp_path):
    def write(*folders):
        write_page(folders, tmp_path / "page.html")
        return Page(tmp_path / "page.html")

    return write


def expected(results):
    """The numbers of the metrics table, by metric, run and column."""
    found = {}
    for run, result in enumerate(results):
        for when, metrics in (("before", result.metrics_before or {}), ("after", result.metrics)):
            for name, metric in metrics.items():
                ends = [] if metric.low is None else [metric.low, metric.high]
                found[name, run, when] = [metric.value, *ends]
                if when == "after":
                    found[name, run, "n"] = [metric.n]
    return found


def test_every_number_is_that_of_the_result(finished, tmp_path, page):
    folders = [finished(method="molf").folder, write_run(tmp_path / "by hand"), finished(method="fft").folder]
    found, results = page(*folders), [read_result(folder) for folder in folders]
    assert found.numbers == expected(results)
    molf, fft = results[0], results[2]
    values = {given["value"] for tag, given in found.tags if tag == "data"}
    for result in (molf, fft):
        training = result.training
        for number in (result.seconds, training.loss, training.tokens, training.parameters, training.steps):
            assert str(number) in values
    assert {str(share) for share in molf.routing.values()} <= values
    shares = found.data["runs"][0]["map"]["shares"]
    mean = [sum(own[0]) / len(own[0]) for own in shares]
    assert mean == pytest.approx(list(molf.routing.values()), abs=1e-4)
    assert found.data["runs"][2] == {"map": None, "scores": None}, "full fine-tuning routes nothing"
    groups = dict(re.findall(r"(\w+ before.*): (\d+)", page(folders[0]).text))
    right = sum(
        int(count) for title, count in groups.items() if title.endswith(("right after", "right before and after"))
    )
    assert 100 * right / sum(map(int, groups.values())) == molf.metrics[molf.headline].value


def test_settings_that_differ(tmp_path, page):
    config = {"run_name": "b", "task": "fact", "method": "molf", "learning_rate": 2e-3, "ranks": [2, 4]}
    text = page(write_run(tmp_path / "a"), write_run(tmp_path / "b", config=config)).text
    differ, same = text[text.index("These differ between") :].split("The same in all runs")
    assert "learning_rate" in differ and "ranks" in differ and "[2, 4]" in differ
    assert "method" not in differ and "method" in same and "run_name" not in text


def test_runs_of_one_name_are_told_apart(tmp_path, page):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    text = page(one, two, two).text
    assert str(one) in text and f"{two} (2)" in text


def test_long_names_are_cut_in_charts_unless_they_get_the_same(tmp_path, page):
    def labels(*names):
        runs = [write_run(tmp_path / f"{name[-1]}{len(name)}", name=name) for name in names]
        return page(*runs).data["figures"]["headline"]["layout"]["yaxis"]["categoryarray"]

    long = "x" * 40
    assert labels(f"{long}1", f"{long}2", "3") == [f"…{'x' * 30}1", f"…{'x' * 30}2", "3"]
    assert labels(f"4{long}", f"5x{long}") == [f"4{long}", f"5x{long}"]


def test_hostile_text_stays_text(tmp_path, page):
    folder = write_run(tmp_path / "run", name=HOSTILE, wrote=HOSTILE, subject=HOSTILE, modules=(HOSTILE, *MODULES))
    found = page(folder)
    scripts = [given for tag, given in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}, {}]
    assert not {"img", "b"} & {tag for tag, _ in found.tags}
    assert all(given["href"].startswith("#") for tag, given in found.tags if tag == "a")
    assert not [name for _, given in found.tags for name in given if name.startswith("on")]
    assert found.data["runs"][0]["map"]["modules"][0] == HOSTILE
    assert HOSTILE in unescape(found.source), "it is shown as it is"


def test_the_page_needs_nothing_else(tmp_path, page):
    found = page(write_run(tmp_path / "run"))
    links = [given[name] for tag, given in found.tags for name in ("src", "href") if name in given]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = [given["content"] for _, given in found.tags if given.get("http-equiv")]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert found.source.count("plotly.js v") == 1


def test_an_evaluation(tmp_path, page):
    folder = write_run(tmp_path / "run", training=None, routing=None, metrics_before=None)
    found = page(folder)
    assert found.data["runs"] == [{"map": None, "scores": None}] and list(found.data["figures"]) == ["headline"]
    assert "keep no history" in found.text and "wrong: 2" in found.text


def test_a_run_of_a_task_that_is_not_known_here_has_no_examples(tmp_path, page):
    config = {"run_name": "mine", "task": "boolq"}
    found = page(write_run(tmp_path / "run"), write_run(tmp_path / "mine", config=config))
    assert (
        "Left out, as the task boolq is not known here." in found.text
        and found.text.count("wrong before, right after") == 1
    )
    alone = page(tmp_path / "mine")
    assert "Left out" in alone.text and "#examples" in alone.source and "wrong before" not in alone.text


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        write_page([write_run(tmp_path / "run")], tmp_path / "page.html")


def test_an_unfinished_run(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        write_page([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_zero_is_shown_as_any_number(tmp_path, page):
    found = page(write_run(tmp_path / "run", wins=lambda step, layer: True))
    assert "updates won by lora_r2" in found.text and "training dropped_examples" in found.text


def test_the_headline_of_every_task_is_bold(tmp_path, page):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", name="other", headline="score")
    bold = [given for tag, given in page(one, other).tags if tag == "th" and given.get("class") == "headline"]
    assert len(bold) == 2

"""The page in a real browser, which is started once."""

import pytest

from molf.study.report.page import write_page
from report_runs import HOSTILE, MODULES, STACKS, write_run


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """A page about a run whose first depth turns after step 3, and one whose names and answers attack the reader."""
    folder = tmp_path_factory.mktemp("report")
    hostile = (HOSTILE, f"model.layers.0.{HOSTILE.replace('.', '')}", *MODULES, *STACKS)
    runs = [
        write_run(folder / "run", wins=lambda step, layer: (layer % 2 == 0) != (step > 3 and layer < 2)),
        write_run(folder / "other", name=HOSTILE, modules=hostile, wrote=HOSTILE, subject=HOSTILE),
    ]
    write_page(runs, folder / "page.html")
    browser.get((folder / "page.html").as_uri())
    return browser


def part(opened, name, run=0):
    return opened.find_elements("css selector", "article.routing")[run].find_element("css selector", name)


def grid(opened, name):
    """The numbers of a map, in rows."""
    return opened.execute_script("return arguments[0].data[0].z", part(opened, name))


def test_it_draws_everything_without_a_complaint(opened):
    assert opened.get_log("browser") == []
    charts = opened.find_elements("css selector", ".chart:not(.layer)")
    assert len(charts) == 4 + 2 * 3 + 1, "headline and curves; two maps and the scores of each run; a mixture"
    assert all(chart.find_elements("css selector", ".main-svg") for chart in charts)


def test_the_slider_moves_the_maps(opened):
    slider = part(opened, "input")
    assert part(opened, ".span").text == "all steps: steps 1 to 6"
    assert grid(opened, ".map") == [[0.5, 0.5], [1, 0], [1, 0]]
    assert grid(opened, ".rest")[0] == pytest.approx([-1 / 3, 1 / 3])
    assert "explains 66.7 %" in part(opened, ".explained").text
    slider.send_keys("\ue014" * 4)  # the right arrow key
    assert part(opened, ".span").text == "step 4"
    assert grid(opened, ".map") == [[0, 1], [1, 0], [1, 0]]
    assert grid(opened, ".rest")[0] == pytest.approx([-2 / 3, 2 / 3])
    slider.send_keys("\ue011")  # the home key
    assert grid(opened, ".map")[0] == [0.5, 0.5]


def test_another_expert_may_be_shown(opened):
    choice = part(opened, "select")
    choice.send_keys("lora_r2")
    assert grid(opened, ".map") == [[0.5, 0.5], [0, 1], [0, 1]]
    choice.send_keys("fft")


@pytest.mark.parametrize(
    ("run", "chart", "title"),
    [
        (0, ".map", "model.layers.1.self_attn.q_proj: share of steps won"),
        (1, ".mixture", "model.layers.1.experts.up_proj[0]: share of steps won"),
    ],
)
def test_a_click_opens_a_layer(run, chart, title, opened):
    from selenium.webdriver import ActionChains

    plot = part(opened, f"{chart} .nsewdrag", run)
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    # Left of the middle is the first of two columns; in the middle the second of three depths.
    ActionChains(opened, duration=0).move_to_element_with_offset(plot, -plot.size["width"] // 4, 0).click().perform()
    assert part(opened, ".layer-name", run).text == title
    curves = opened.execute_script("return arguments[0].data.map(curve => curve.y)", part(opened, ".layer", run))
    assert curves == [[1] * 6, [0] * 6]


def test_hostile_text_runs_nothing(opened):
    assert opened.execute_script("return window.hits") == 0
    assert not opened.find_elements("css selector", "img, script[src], svg a, main a")
    assert HOSTILE in [heading.get_attribute("textContent") for heading in opened.find_elements("css selector", "h3")]
    hidden = opened.execute_script("return [...document.querySelectorAll('pre')].map(pre => pre.textContent)")
    assert HOSTILE in hidden


def test_it_is_readable_in_the_dark_and_on_a_phone(opened):
    ink = "return getComputedStyle(document.querySelector('.map .xtick text')).fill"
    light = opened.execute_script(ink)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    assert (light, opened.execute_script(ink)) == ("rgb(27, 31, 36)", "rgb(228, 232, 236)")
    opened.refresh()
    assert opened.execute_script("return document.documentElement.scrollWidth") == 360
    assert opened.get_log("browser") == []

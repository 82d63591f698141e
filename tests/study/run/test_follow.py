import io
import json
import tracemalloc

import pytest
from rich.console import Console

from molf.study.results.routing_reader import read_routing
from molf.study.run.follow import MAX_CELLS, follow, routing_table
from report_runs import HOSTILE, MODULES, STACKS, write_log


def screen(terminal=False):
    return Console(file=io.StringIO(), width=300, force_terminal=terminal, color_system=None)


def shown(*given):
    console = screen()
    console.print(routing_table(*given))
    return console.file.getvalue()


def in_turn(*events):
    """A pause in which the next event happens."""
    left = iter(events)
    return lambda seconds: next(left)()


def test_a_run_from_before_its_folder_exists_until_its_end(tmp_path):
    run, console = tmp_path / "run", screen(terminal=True)

    def write(steps):
        run.mkdir(exist_ok=True)
        write_log(run / "routing.jsonl", steps)

    def stop():
        (run / "routing.jsonl").unlink()

    pause = in_turn(
        lambda: run.mkdir(),
        lambda: write(3),
        stop,
        lambda: write(9),
        lambda: (run / "result.json").write_text("{}"),
    )
    follow(run, console, pause)
    drawn = console.file.getvalue()
    assert "no decision is logged yet" in drawn and "3 logged steps, the last one is 3" in drawn
    assert drawn.rindex("finished; 9 logged steps, the last one is 9") > drawn.rindex("no run of molf works there now")
    with pytest.raises(StopIteration):
        pause(0)


def test_ctrl_c_leaves_cleanly(tmp_path):
    def interrupted(seconds):
        raise KeyboardInterrupt

    console = screen(terminal=True)
    write_log(tmp_path / "routing.jsonl", 2)
    follow(tmp_path, console, interrupted)
    assert "2 logged steps" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_before_the_first_step():
    drawn = shown(None, "a run", "running")
    assert drawn == "a run: running; no decision is logged yet\n"


def test_who_won(tmp_path):
    write_log(tmp_path / "log", 40, modules=MODULES + STACKS, wins=lambda step, layer: layer % 2 == 0 and step <= 36)
    drawn = shown(read_routing(tmp_path / "log"), "a run", "running").splitlines()
    rows = {cells[0]: cells[1:] for line in drawn if len(cells := line.split()) == 5}
    assert rows["q_proj"] == ["90%", "10%", "0%", "███"]
    assert rows["k_proj"] == ["0%", "100%", "0%", "▁▁▁"]
    assert rows["up_proj"] == ["45%", "55%", "0%", "▄▄▄"] and rows["all"] == ["45%", "55%", "0%", "▄▄▄"]


def test_many_depths_share_blocks(tmp_path):
    write_log(tmp_path / "log", 1, modules=[f"layers.{depth}.q_proj" for depth in range(100)])
    drawn = shown(read_routing(tmp_path / "log"), "a run", "running")
    assert [len(word) for word in drawn.split() if word[0] in "▁▂▃▄▅▆▇█"] == [34]


def test_names_are_shown_as_they_are(tmp_path):
    write_log(tmp_path / "log", 1, modules=["layers.0.$x$\x1b", HOSTILE])
    drawn = shown(read_routing(tmp_path / "log"), "[bold]x\x1b[31m", "running")
    assert "$x$\N{REPLACEMENT CHARACTER}" in drawn and "[bold]x" in drawn and "\x1b" not in drawn


def test_who_works_there(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr("molf.study.run.follow.in_use", lambda run: not states)
    console = screen(terminal=True)

    def pause(seconds):
        states.append(seconds)
        if len(states) > 1:
            raise KeyboardInterrupt

    follow(tmp_path, console, pause)
    assert 0 < console.file.getvalue().index("running;") < console.file.getvalue().index("no run of molf works")


def test_memory_does_not_grow_with_the_steps(tmp_path):
    write_log(tmp_path / "routing.jsonl", 300)
    taken = []

    def pause(seconds):
        taken.append(tracemalloc.get_traced_memory()[0])
        if len(taken) == 4:
            raise KeyboardInterrupt
        lines = (tmp_path / "routing.jsonl").read_text().splitlines()
        step = json.loads(lines[-1])["step"]
        with (tmp_path / "routing.jsonl").open("a") as file:
            for more in range(1, 301):
                file.write(lines[-1].replace(f'"step":{step}', f'"step":{step + more}') + "\n")

    tracemalloc.start()
    follow(tmp_path, screen(terminal=False), pause)
    tracemalloc.stop()
    assert taken[3] - taken[1] < 100_000 and MAX_CELLS <= 100_000

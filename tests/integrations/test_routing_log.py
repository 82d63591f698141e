import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import molf
from molf import MoLF, RoutingLog
from molf.integrations.routing_lines import CompactLines, selection_record
from molf.integrations.routing_log import _MAX_PENDING, Fetch
from molf.study.results.routing_reader import read_routing
from routing_logs import routing, run_by_hand, steps
from small import tiny_llama


@pytest.fixture
def run(tmp_path):
    return run_by_hand(tmp_path)


def test_a_fused_step_that_was_left_out_has_no_line(run):
    run.event("on_train_begin")
    run.step()
    run.optimizer.routing = replace(routing(), taken=torch.tensor(False))
    run.event("on_optimizer_step")
    run.state.global_step += 1
    run.step()
    assert steps(run.log.path) == [1, 3]


def test_a_line_for_every_step(run):
    assert not run.log.path.parent.exists()
    run.event("on_train_begin")
    expected, lines = "", CompactLines()
    for t in range(3):
        run.step()
        expected += lines.encode(t + 1, run.optimizer.routing)
        assert run.log.path.read_text() == expected  # on disk at once
    assert [path.name for path in run.log.path.parent.iterdir()] == ["routing.jsonl"]


def test_the_published_format(tmp_path):
    run = run_by_hand(tmp_path, format="published")
    run.event("on_train_begin")
    assert run.log.path.name == "molf_expert_selection.jsonl"
    for t in range(3):
        run.step()
        last = json.loads(run.log.path.read_text().splitlines()[-1])
        assert last == selection_record(t + 1, run.optimizer.routing)
    run.state.global_step = 2
    run.event("on_train_begin")
    run.step()
    assert steps(run.log.path) == [1, 2, 3]


def test_some_steps_only(tmp_path, caplog):
    run = run_by_hand(tmp_path, every=3)
    run.event("on_train_begin")
    shares = []
    for _ in range(7):
        run.step()
        shares.append(run.optimizer.routing.share("fft"))
    assert steps(run.log.path) == [3, 6]
    assert run.logged(loss=1.0)["molf/fft_share"] == pytest.approx(sum(shares) / 7), "that of all steps"
    run.event("on_train_begin")
    assert "lacks" not in caplog.text
    for _ in range(2):
        run.step()
    assert steps(run.log.path) == [3, 6, 9]
    run.log.path.write_text("")
    run.event("on_train_begin")
    assert "lacks 3 of the 3 steps before the checkpoint" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("format", "csv")])
def test_settings_that_cannot_be(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}='?{value}"):
        RoutingLog(tmp_path, **{name: value})


def test_steps_left_out_have_no_line(run):
    run.event("on_train_begin")
    for spoilt in (True, False, True, False):
        run.step(spoilt)
    assert steps(run.log.path) == [2, 4]
    assert run.logged(loss=1.0)["molf/skipped_steps"] == 2


def test_a_new_run_starts_a_new_log(run):
    run.log.path.parent.mkdir(parents=True)
    run.log.path.write_text('{"step": 1, "selections": {}}\n')
    run.event("on_train_begin")
    run.step()
    assert steps(run.log.path) == [1]
    assert len(json.loads(run.log.path.read_text().splitlines()[0])["modules"]) == 3


HEADER = '{"experts":["fft","lora_r2"],"modules":["a"]}\n'
LATER = '{"experts":["fft","lora_r2"],"modules":["a","b"]}\n'


def line(step):
    return f'{{"step":{step},"won":[[1],[0]],"scores":[[1],[2]]}}\n'


@pytest.mark.parametrize(
    "after",
    ["", line(3), line(3) + line(4)[:20], LATER, LATER + line(3), LATER[:20], line(3)[:-1]],
    ids=["nothing", "a step", "a torn step", "a header", "a header and a step", "a torn header", "no newline"],
)
def test_resuming_drops_later_and_torn_lines(run, after):
    run.log.path.parent.mkdir(parents=True)
    before = HEADER + line(1) + line(2)
    run.log.path.write_text(before + after)
    run.state.global_step = 2
    run.event("on_train_begin")
    assert run.log.path.read_text() == before
    run.step()
    assert steps(run.log.path) == [1, 2, 3]
    names = json.loads(run.log.path.read_text().splitlines()[3])["modules"]
    assert names == ["a", *run.optimizer.routing.modules]


def test_resuming_needs_no_second_header(run):
    run.event("on_train_begin")
    for _ in range(3):
        run.step()
    whole = run.log.path.read_text()
    run.state.global_step = 1
    run.event("on_train_begin")
    assert run.log.path.read_text() == "".join(whole.splitlines(keepends=True)[:2])
    run.step()
    run.step()
    assert steps(run.log.path) == [1, 2, 3] and run.log.path.read_text().count("experts") == 1


@pytest.mark.parametrize("formats", [("compact", "published"), ("published", "compact")])
def test_a_log_that_is_resumed_keeps_its_format(formats, tmp_path, caplog):
    """Two files would each have a part of the steps, and one of them is read."""
    first, second = (run_by_hand(tmp_path, format=name) for name in formats)
    first.event("on_train_begin")
    first.step()
    first.step()
    second.state.global_step = 1
    second.event("on_train_begin")
    second.step()
    assert second.log.path == first.log.path and steps(first.log.path) == [1, 2]
    assert [*first.log.path.parent.iterdir()] == [first.log.path] and "lacks" not in caplog.text
    assert read_routing(first.log.path).steps == 2


def test_resuming_without_a_log(run, caplog):
    run.state.global_step = 2
    with caplog.at_level(logging.WARNING):
        run.event("on_train_begin")
    assert f"{run.log.path} lacks 2 of the 2 steps before the checkpoint" in caplog.text
    run.step()
    assert steps(run.log.path) == [3]


def test_resuming_with_a_gap_or_none(run, caplog):
    run.event("on_train_begin")
    for spoilt in (False, True, False, False):
        run.step(spoilt)
    run.event("on_train_begin")
    assert "lacks" not in caplog.text, "the step that was left out has no line"
    lines = run.log.path.read_text().splitlines(keepends=True)
    run.log.path.write_text(lines[0] + lines[1] + lines[3])
    with caplog.at_level(logging.WARNING):
        run.event("on_train_begin")
    assert "lacks 1 of the 4 steps" in caplog.text


@pytest.mark.parametrize(
    "line",
    [
        *(b"{broken", b"\xff", b"3", b'{"step": Infinity}', b"[" * 10_000, b'{"step": ' + b"9" * 5000 + b"}"),
        *(b'{"modules": ["a"]}', b'{"modules": 3, "experts": []}', b'{"modules": [["a"]], "experts": []}'),
    ],
    ids=len,
)
def test_a_damaged_line_is_named(line, run):
    run.log.path.parent.mkdir(parents=True)
    run.log.path.write_bytes(HEADER.encode() + line + b"\n")
    run.state.global_step = 2
    with pytest.raises(ValueError, match=rf"{run.log.path}, line 2: not a line of a routing log"):
        run.event("on_train_begin")


def test_decisions_of_before_are_not_logged_again(run):
    run.step()
    run.state.global_step = 0
    run.event("on_train_begin")
    run.step(spoilt=True)
    assert steps(run.log.path) == []


@pytest.mark.parametrize("done", [True, False])
def test_numbers_in_the_logs(run, monkeypatch, done):
    monkeypatch.setattr(Fetch, "done", done)
    run.event("on_train_begin")
    shares = []
    for _ in range(2):
        run.step()
        shares.append(run.optimizer.routing.share("fft"))
    logs = run.logged(loss=1.0, learning_rate=5.0)
    assert logs["lr/fft"] == pytest.approx(1e-3) and logs["lr/lora"] == pytest.approx(3e-3)
    assert logs["molf/fft_share"] == pytest.approx(sum(shares) / 2)
    assert logs["molf/skipped_steps"] == 0
    assert logs["grad_norm"] == pytest.approx(run.optimizer.grad_norm.item())
    assert (logs["loss"], logs["learning_rate"]) == (1.0, 5.0)
    assert run.state.log_history[-1] == {**logs, "step": 2}
    json.dumps(run.state.log_history)


def test_a_rate_that_is_a_tensor_is_that_of_the_step(run):
    run.event("on_train_begin")
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    run.step()
    for group in run.optimizer.param_groups:
        group["lr"].fill_(5e-4)
    logs = run.logged(loss=1.0)
    assert (logs["lr/fft"], logs["lr/lora"]) == (pytest.approx(1e-3), pytest.approx(3e-3))
    json.dumps(logs)


def test_share_is_that_since_the_last_log(run):
    run.event("on_train_begin")
    run.step()
    run.logged(loss=1.0)
    run.step()
    assert run.logged(loss=1.0)["molf/fft_share"] == run.optimizer.routing.share("fft")
    assert "molf/fft_share" not in run.logged(loss=1.0)


def test_the_log_is_on_the_disk_before_a_checkpoint(run, monkeypatch):
    brought = []
    monkeypatch.setattr("molf.integrations.routing_log.sync", lambda path: brought.append((path, path.read_text())))
    run.event("on_train_begin")
    run.step()
    run.optimizer.state_dict()
    assert brought == [(run.log.path, run.log.path.read_text())] and steps(run.log.path) == [1]
    run.log._writes = False
    run.optimizer.state_dict()
    assert len(brought) == 1


@pytest.mark.parametrize("logs", [{"eval_loss": 1.0}, {"train_runtime": 1.0, "train_loss": 1.0}], ids=str)
def test_other_logs_are_left_alone(run, logs):
    run.event("on_train_begin")
    run.step()
    assert run.logged(**logs) == logs
    assert run.state.log_history[-1] == {**logs, "step": 1}


def test_only_the_main_process_writes(run):
    run.state.is_world_process_zero = False
    run.event("on_train_begin")
    run.step()
    assert not run.log.path.parent.exists()
    assert "molf/fft_share" in run.logged(loss=1.0)


class Spy(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def trainer_with(folder, max_grad_norm=0.0, model=None, **options):
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    quiet["max_grad_norm"] = max_grad_norm
    arguments = TrainingArguments(output_dir=str(folder), max_steps=2, logging_steps=1, **quiet)
    return Trainer(model or tiny_llama(), arguments, train_dataset=rows, **options)


def test_attached_it_comes_before_the_trackers(tmp_path):
    spy = Spy()
    trainer = molf.use_in(trainer_with(tmp_path, callbacks=[spy]), ranks=(2,), lr=1e-3, lora_lr=2e-3)
    log = RoutingLog(tmp_path)
    assert log.attach(trainer) is log
    assert trainer.callback_handler.callbacks[0] is log
    trainer.train()
    assert {"lr/fft", "lr/lora", "molf/fft_share", "molf/skipped_steps"} <= spy.seen[0].keys()
    assert [row["lr/fft"] for row in spy.seen[:2]] == pytest.approx([1e-3, 5e-4])  # linear decay over two steps
    assert [row["lr/lora"] for row in spy.seen[:2]] == pytest.approx([2e-3, 1e-3])
    assert steps(log.path) == [1, 2]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3], ids=["clipped in the step", "clipped by the trainer"])
def test_logged_norm_is_that_before_clipping(tmp_path, max_grad_norm):
    inside = None if max_grad_norm else 1e-3
    trainer = molf.use_in(trainer_with(tmp_path, max_grad_norm=max_grad_norm), ranks=(2,), max_grad_norm=inside)
    RoutingLog(tmp_path).attach(trainer)
    trainer.train()
    assert all(row["grad_norm"] > 0.1 for row in trainer.state.log_history if "loss" in row)


def test_released_gradients_that_the_trainer_would_clip(tmp_path):
    model = tiny_llama()
    optimizer = MoLF(model, ranks=(2,), optimizer_in_backward=True)
    trainer = trainer_with(tmp_path, 1.0, model, optimizers=(optimizer, None), callbacks=[RoutingLog(tmp_path)])
    with pytest.raises(ValueError, match=r"optimizer_in_backward=True with max_grad_norm=1.0: .*set max_grad_norm=0$"):
        trainer.train()


def test_another_optimizer_is_an_error(tmp_path):
    trainer = trainer_with(tmp_path, callbacks=[RoutingLog(tmp_path)])
    with pytest.raises(TypeError, match=r"this trainer's optimizer is AdamW.*molf\.use_in"):
        trainer.train()
    assert not (tmp_path / "routing.jsonl").exists()


class Slow:
    """Makes decisions reach the host only when waited for, and counts the waits."""

    def __init__(self, monkeypatch):
        self.waited = 0
        monkeypatch.setattr(Fetch, "done", False)
        get = Fetch.get

        def waiting(fetch):
            self.waited += 1
            return get(fetch)

        monkeypatch.setattr(Fetch, "get", waiting)


@pytest.fixture
def slow(monkeypatch):
    return Slow(monkeypatch)


def test_no_step_waits_and_no_line_is_lost(run, slow):
    run.event("on_train_begin")
    for _ in range(5):
        run.step()
    assert steps(run.log.path) == [] and slow.waited == 0
    run.event("on_train_end")
    assert steps(run.log.path) == [1, 2, 3, 4, 5]
    run.optimizer.state_dict()
    assert steps(run.log.path) == [1, 2, 3, 4, 5]


def test_what_is_on_its_way_is_written_in_order_when_it_is_there(run, monkeypatch):
    monkeypatch.setattr(Fetch, "done", False)
    run.event("on_train_begin")
    run.step()
    run.step()
    monkeypatch.setattr(Fetch, "done", True)
    run.step()
    assert steps(run.log.path) == [1, 2, 3]


def test_no_more_than_a_few_decisions_are_kept(run, slow):
    run.event("on_train_begin")
    for _ in range(_MAX_PENDING + 3):
        run.step()
    assert steps(run.log.path) == [1, 2, 3]


def test_a_checkpoint_is_never_ahead_of_the_log(run, slow):
    """A Trainer calls `on_save` after writing a checkpoint, and may be killed in between."""
    run.event("on_train_begin")
    run.step()
    run.step()
    copy.deepcopy(run.optimizer.state_dict())
    assert steps(run.log.path) == [1, 2]
    run.step()
    run.state.global_step = 2  # killed, and resumed from that checkpoint
    run.event("on_train_begin")
    run.step()
    run.event("on_train_end")
    assert steps(run.log.path) == [1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_decision_is_fetched_without_waiting():
    decided = routing()
    decided = replace(
        decided, scores=decided.scores.cuda(), chosen=decided.chosen.cuda(), taken=torch.tensor(True).cuda()
    )
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fetch = Fetch(decided)
        decided.scores.zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = fetch.get()
    assert fetch.done and torch.equal(found.scores, routing().scores) and torch.equal(found.chosen, routing().chosen)
    assert found.scores.is_pinned() and found.taken

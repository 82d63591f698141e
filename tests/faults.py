"""Real training runs, killed with SIGKILL and resumed; ``python tests/faults.py`` prints a table of what was lost.

Runs are forked from a server process that has imported the libraries, so that one costs about as much as its training.
"""

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

import molf.cli
import molf.study.run.record
import molf.study.run.train
from molf.integrations.checkpoint_folder import UNFINISHED, checkpoints, step_of
from molf.integrations.routing_lines import LOG_FILES
from molf.study.run.job import make_trainer
from served import CONTEXT
from small_runs import carry_out, small_run, weights
from tiny_checkpoints import save_tiny_checkpoint

METHODS = {
    "molf": {},
    "molf, bf16 weights": {"dtype": "bfloat16"},
    "molf, branched": {"lora_dropout": 0.1},
    "molf_e": {"method": "molf_e"},
    **{name: {"method": name} for name in ("fft", "lora", "rslora", "dora", "pissa", "eva", "lora_plus", "adalora")},
}
"""Settings of the runs to kill, by name: every method, and every form of MoLF."""

SAVED_AS_LORA = ("rslora", "dora", "eva", "lora_plus")
"""Those that save what LoRA does. `python tests/faults.py` kills them, the test suite does not; `test_train` resumes each."""

STEPS = 8
RUN = {"gradient_accumulation_steps": 1, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "eval_limit": 1}
"""Two epochs of four steps with a checkpoint after every second step."""


@dataclass(frozen=True)
class Outcome:
    """The effect of kills on a run.

    Attributes:
        kills: Number of kills.
        while_writing: Number of kills while a checkpoint was written, renamed or removed.
        repeated: Total number of steps that were repeated.
        difference: Largest difference of a final weight from the uninterrupted run.
        same_log: Whether the routing logs are equal, byte for byte; None without routing.
    """

    kills: int
    while_writing: int
    repeated: int
    difference: float
    same_log: bool | None


class CountSteps(TrainerCallback):
    """Appends a byte to a file at every step."""

    def __init__(self, file):
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        with self.file.open("ab") as file:
            file.write(b".")


class Run:
    """A run of a method in a folder, which children of this process start until one finishes it.

    Args:
        name: One of ``METHODS``.
        model: The folder of the model.
        folder: The run's folder; its log and the count of its steps go beside it.
    """

    def __init__(self, name, model, folder):
        self.settings = small_run(model, folder) | RUN | METHODS[name] | {"resume_from_checkpoint": True}
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder, self.log, self.steps = folder, folder.with_suffix(".log"), folder.with_suffix(".steps")

    def start(self, kill_at=None):
        """Start a child, which kills itself at its ``kill_at``-th change of a file if that is given."""
        process = CONTEXT.Process(target=_child, args=(self.settings, self.log, self.steps, kill_at))
        process.start()
        return process

    def finish(self):
        """Let a child finish the run."""
        process = self.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"the run ended with {process.exitcode}:\n{self.log.read_text()[-3000:]}")

    def steps_taken(self):
        return self.steps.stat().st_size if self.steps.exists() else 0

    def kill(self, rng):
        """Start a child and kill it at a random moment after a random number of its steps.

        Returns:
            Whether a checkpoint was being written, renamed or removed; None if the child finished first.
        """
        done = self.steps_taken()
        there = checkpoints(self.folder)
        left = STEPS - step_of(there[-1]) if there else STEPS  # none if it was killed after its last step
        target = done + rng.randrange(max(left, 1))
        process = self.start()
        while process.is_alive() and self.steps_taken() < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.0 if target == done else 0.1))
        process.kill()
        process.join()
        return self.writing() if process.exitcode == -signal.SIGKILL else None

    def kill_at(self, number):
        """Start a child that is killed when it is about to change the folder for the ``number``-th time; return as ``kill``."""
        process = self.start(kill_at=number)
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run ended with {process.exitcode}:\n{self.log.read_text()[-3000:]}")
        return self.writing() if process.exitcode else None

    def writing(self):
        unfinished = self.folder / UNFINISHED
        return unfinished.is_dir() and any(unfinished.iterdir())

    def difference(self, other):
        """Return the largest difference of a final weight from another run's."""
        one, two = weights(self.folder), weights(other.folder)
        assert one.keys() == two.keys()
        return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)

    def routing(self):
        log = self.folder / LOG_FILES["compact"]
        return log.read_bytes() if log.exists() else None


def _child(settings, log, steps, kill_at):
    gc.freeze()  # keeps the garbage collector out of the imported libraries
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kill_at is not None:
        _kill_at_change(settings["output_dir"], kill_at)

    def make(*given, **more):
        trainer = make_trainer(*given, **more)
        trainer.add_callback(CountSteps(steps))
        return trainer

    molf.study.run.train.make_trainer = make
    carry_out(settings)


def _kill_at_change(folder, number):
    """Kill this process when it is about to change the folder for the ``number``-th time."""
    changes = iter(range(number))

    def watch(event, arguments):
        change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and arguments[1] in WRITES
        )
        if change and str(arguments[0]).startswith(folder) and next(changes, None) == number - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


WRITES = ("w", "wb", "a", "ab", "xb")


def log_and_die(settings, log_file):
    """Carry out a run that is killed between its row in the log and its result."""
    os.environ["LOG_FILE"] = str(log_file)
    molf.study.run.record.write_result = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    carry_out(settings)


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("this rank fails")


def fail_on_rank_1(argv):
    """Carry out a ``molf`` command whose training fails after its first step on rank 1."""

    def make(*given, **more):
        trainer = make_trainer(*given, **more)
        if os.environ["RANK"] == "1":
            trainer.add_callback(Fail())
        return trainer

    molf.study.run.train.make_trainer = make
    return molf.cli.main(argv)


def killed_at_random(name, model, folder, kills, rng):
    """Kill a run of a method at random moments, resume it each time, and compare it with an uninterrupted one."""
    return _killed(name, model, folder, kills, lambda run: run.kill(rng))


def killed_at_changes(name, model, folder, kills, rng):
    """Kill a run just before random changes of the file system, which are those of writing a checkpoint."""
    return _killed(name, model, folder, kills, lambda run: run.kill_at(rng.randint(1, 40)))


def _killed(name, model, folder, kills, kill):
    reference, run = Run(name, model, folder / "whole"), Run(name, model, folder / "killed")
    reference.finish()
    moments = []
    while len(moments) < kills:
        writing = kill(run)
        if writing is None:  # it had finished already: start again
            shutil.rmtree(run.folder)
            run.steps.unlink()
            moments.clear()
        else:
            moments.append(writing)
    return _outcome(run, reference, moments)


def _outcome(run, reference, moments):
    run.finish()
    repeated = run.steps_taken() - STEPS
    same_log = None if reference.routing() is None else run.routing() == reference.routing()
    return Outcome(len(moments), sum(moments), repeated, run.difference(reference), same_log)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=2, help="of each method, at random moments")
    parser.add_argument("--changes", type=int, default=5, help="of MoLF and of AdaLoRA, at random changes of files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    print(
        "| run | killed | while writing a checkpoint | steps repeated | largest difference of a weight | routing log |"
    )
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    cases = [(name, killed_at_random, args.kills) for name in METHODS]
    cases += [(name, killed_at_changes, args.changes) for name in ("molf", "adalora")]
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_checkpoint(Path(folder) / "model")
        for i, (name, kill, kills) in enumerate(cases):
            outcome = kill(name, f"{folder}/model", Path(folder) / str(i), kills, rng)
            where = name if kill is killed_at_random else f"{name}, at file operations"
            log = "none" if outcome.same_log is None else "same" if outcome.same_log else "differs"
            print(
                f"| {where} | {outcome.kills} | {outcome.while_writing} | {outcome.repeated} | {outcome.difference} | {log} |"
            )
            total += outcome.kills
    print(f"\n{total} kills")


if __name__ == "__main__":
    main()

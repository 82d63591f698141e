"""Processes forked from one that has imported the libraries once, so that their start costs next to nothing."""

import gc
import os
import socket
import sys
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["molf.study.run.train", "transformers.models.llama.modeling_llama"])


def start_command(argv, output, **environment):
    """Start ``molf`` with some arguments in a process of its own, in this folder and environment.

    Args:
        argv: The command and its arguments.
        output: File that gets all that the process prints, after what is there.
        environment: Variables to add.
    """
    return start(_command, output, argv, **environment)


def start(function, output, *given, **environment):
    """Start a function of a module in ``tests`` likewise; its process ends with what it returns as status."""
    where = (str(Path.cwd()), os.environ | environment, str(Path(output).absolute()))
    process = CONTEXT.Process(target=_work, args=(*where, function, given))
    process.start()
    return process


def free_port():
    """Return a port for the ranks of a group to meet at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _work(folder, environment, output, function, given):
    gc.freeze()  # keeps the garbage collector out of the imported libraries
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(function(*given))


def _command(argv):
    from molf.cli import main

    return main(argv)

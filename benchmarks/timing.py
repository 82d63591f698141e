"""Side-by-side timing: contenders take turns in one process, ratios are taken within a turn."""

import statistics
import time

import torch


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(contenders, rounds, warmup=1):
    """Run every contender once a round and return its seconds per round, without the warm-up rounds.

    Args:
        contenders: Name to a function without arguments.
        rounds: Counted rounds.
        warmup: Rounds before them.
    """
    seconds = {name: [] for name in contenders}
    for round_ in range(warmup + rounds):
        for name, work in contenders.items():
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(numerators, denominators):
    """Return the median of the round-by-round ratios, with their least and greatest."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine():
    """Say what this ran on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"

"""Timing: variants interleaved in one process, medians with the 20-80% range.

A timer turns a call into milliseconds. `CudaTimer` clears L2 before each call and reads device events; `CpuTimer`
reads a clock, which a test may replace.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Stats(NamedTuple):
    """Milliseconds of one variant."""

    median: float
    p20: float
    p80: float
    runs: int


def stats(times: list[float]) -> Stats:
    t = sorted(times)
    return Stats(*(t[round(q * (len(t) - 1))] for q in (0.5, 0.2, 0.8)), len(t))


class CpuTimer:
    """Wall time by `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def __call__(self, fn: Callable[[], object]) -> float:
        start = self.clock()
        fn()
        return 1e3 * (self.clock() - start)


class CudaTimer:
    """Device time. L2 is filled with other bytes first; `lead` keeps the device busy while the host enqueues, so that
    an operation of a few microseconds isn't charged for Python (off for whole steps: there Python is part of it)."""

    clock = staticmethod(time.perf_counter)

    def __init__(self, lead: bool = True):
        self.lead, self.flush = lead, torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, fn: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        if self.lead:
            torch.cuda._sleep(4_000_000)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def interleaved(
    variants: list[Callable[[], object]], timer, budget_s: float, least: int = 3, most: int = 100
) -> list[Stats]:
    """Time each variant in turn, round after round, from `least` to `most` rounds until budget_s is spent.

    The order turns each round, so that none always runs in another's wake. A variant so slow that it alone would eat
    the budget is timed least times."""
    start, times = timer.clock(), [[] for _ in variants]
    for turn in range(most if variants else 0):
        for i in range(turn, turn + len(variants)):
            times[i % len(variants)].append(timer(variants[i % len(variants)]))
        if turn + 1 >= least and timer.clock() - start > budget_s:
            break
    return [stats(t) for t in times]

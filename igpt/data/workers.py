"""Worker processes that read picture files. Imports no torch: they start quickly and stay small."""

import collections
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from igpt.data.crops import square

BATCH = 64  # pictures a task
Batch = tuple[int, np.ndarray, list[tuple[str, str]]]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_squares(
    root: Path, names: list[str], start: int, workers: int, size: int, crop: str, seed: int, resample: str
) -> Iterator[Batch]:
    """The pictures names[start:] as squares, task after task in order: (files, uint8 (n, size, size, 3), [(name, why)
    of the unreadable]). A few tasks for each worker are under way at once; workers = 0 reads here."""
    tasks = ((root, names[i : i + BATCH], i, size, crop, seed, resample) for i in range(start, len(names), BATCH))
    if workers == 0 or len(names) - start <= BATCH:  # a single task: processes would only have to start
        yield from (read_batch(*task) for task in tasks)
        return
    # spawn: a fork of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent)
    try:
        waiting = collections.deque()
        for task in tasks:
            waiting.append(pool.submit(read_batch, *task))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_batch(root: Path, names: list[str], first: int, size: int, crop: str, seed: int, resample: str) -> Batch:
    """One task. A random crop depends on the seed and the file's place in the list, not on who reads it when."""
    images, bad = [], []
    for i, name in enumerate(names, first):
        try:
            images.append(square(root / name, size, crop, (seed, i), resample))
        except ValueError as error:
            bad.append((name, str(error)))
    return len(names), np.stack(images) if images else np.empty((0, size, size, 3), np.uint8), bad


def die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

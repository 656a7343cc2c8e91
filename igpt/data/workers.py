"""Workers that read picture files. Imports no torch: they start quickly and stay small."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from igpt.data.crops import square

BATCH = 64  # pictures a task
Batch = tuple[int, np.ndarray, list[tuple[str, str]]]


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_counts(**values: int | None) -> None:
    """Raises ValueError for a value that is neither None nor an integer of 0 or more."""
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"{name}: got {value!r}, expected an integer of 0 or more")


def read_squares(
    root: Path, names: list[str], places: Sequence[int], workers: int, *, size: int, crop: str, seed: int, resample: str
) -> Iterator[Batch]:
    """The pictures names[places] as squares, task after task in order: (files, uint8 (n, size, size, 3), [(name, why)
    of the unreadable]), by so many processes, or with 0, or for a single task, by threads of this one. A few tasks for
    each worker are under way at once."""
    batches = (places[i : i + BATCH] for i in range(0, len(places), BATCH))
    tasks = ((root, [(int(i), names[i]) for i in batch], size, crop, seed, resample) for batch in batches)
    if workers == 0 or len(places) <= BATCH:  # for one task processes would only have to start
        workers = available_cores()
        pool = ThreadPoolExecutor(workers)
    else:
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


def read_batch(root: Path, files: list[tuple[int, str]], size: int, crop: str, seed: int, resample: str) -> Batch:
    """One task. A random crop depends on the seed and the file's place in the list, not on who reads it when."""
    images, bad = [], []
    for i, name in files:
        try:
            images.append(square(root / name, size, crop, (seed, i), resample))
        except ValueError as error:
            bad.append((name, str(error)))
    return len(files), np.stack(images) if images else np.empty((0, size, size, 3), np.uint8), bad


def die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever. Ctrl-C, which a terminal sends to all, is the
    parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

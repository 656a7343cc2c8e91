"""Processes to kill and to train with others: forked from a server that has imported everything once."""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from igpt.programs import train

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["igpt.programs.train", "tests.children", "torch._dynamo"])


def options(run: Path, **changes) -> train.Options:
    """A run that takes a moment: 0.1 M parameters, 64 pixels."""
    return train.Options(**{
        "run": run, "preset": "tiny", "layers": 2, "width": 32, "heads": 2, "size": 8, "batch": 8, "steps": 12,
        "save_every": 4, "valid_every": 4, "valid_pictures": 20, "sample_every": 0, "log_every": 1, "device": "cpu",
        **changes,
    })  # fmt: skip


def start(target, *args):
    child = FORK.Process(target=target, args=args)
    child.start()
    return child


def train_here(asked: train.Options) -> None:
    torch.set_num_threads(1)
    train.run(asked)


def train_killed_at(asked: train.Options, nth: int) -> None:
    """Dies by SIGKILL just before the nth rename, replacement or removal of a file or folder."""
    count = iter(range(1, nth))

    def deadly(function):
        def wrapped(*args, **kwargs):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.rename, os.replace, shutil.rmtree = deadly(os.rename), deadly(os.replace), deadly(shutil.rmtree)
    train_here(asked)


def train_until(asked: train.Options, step: int | None) -> None:
    """SIGTERM comes, to the first process only, when the figures of `step` are in."""
    if step is not None and os.environ.get("RANK", "0") == "0":
        report = train.Training.report

        def signalling(self, at, statistics):
            if at == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return report(self, at, statistics)

        train.Training.report = signalling
    train_here(asked)


def rank_main(rank: int, world: int, port: int, asked: train.Options, until: int | None) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    train_until(asked, until)


def train_together(world: int, asked: train.Options, until: int | None = None) -> None:
    """As torchrun would, without its start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rank_main, rank, world, port, asked, until) for rank in range(world)]
    for child in ranks:
        child.join(120)
    codes = [child.exitcode for child in ranks]
    for child in ranks:
        child.kill()
    if codes != [0] * world:
        sys.exit(f"exit codes {codes}")


def wait_for(condition, child, seconds: float = 120) -> None:
    """Until condition() or the child's end."""
    until = time.monotonic() + seconds
    while child.is_alive() and not condition() and time.monotonic() < until:
        time.sleep(0.002)

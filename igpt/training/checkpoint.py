"""Checkpoints of a run: torch.distributed.checkpoint, written by a thread, resharded to any number of processes.

    DIR/step-40/  whole: renamed from DIR/.writing-step-40 once every file is on the disk (convert/runs.py)
    DIR/latest    "step-40", replaced by a rename

A process killed at any point leaves the earlier checkpoints and perhaps a .writing- folder, which the next run removes.
Optimiser state has pickles, which resuming loads: resume only runs of your own. Reading one as a model loads none.
"""

import json
import math
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from igpt import convert
from igpt.convert.runs import SIZES, Trained, best, checkpoints, damage, step_of
from igpt.training.processes import Processes

WRITING = ".writing-"
GOING = ".removing-"

# A single process need not be told that it is one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Checkpoints:
    """The checkpoints in `folder`: the newest `keep` of them, and the best by validation loss, which is `lowest`
    (infinite before the first validation). Every method is called by every process."""

    def __init__(self, folder: Path, us: Processes, keep: int = 2):
        self.folder, self.us, self.keep, self.pending = folder, us, keep, None
        if us.first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in [*folder.glob(f"{WRITING}*"), *folder.glob(f"{GOING}*")]:
                shutil.rmtree(left)
        lowest = math.inf
        if us.first and (path := best(checkpoints(folder))):
            lowest = Trained.of(path).valid_loss
        self.lowest = us.from_first(lowest)

    def latest(self) -> Path | None:
        """The newest whole checkpoint; `latest` is asked first, then the folders, newest first."""
        pointer = self.folder / "latest"
        named = [self.folder / pointer.read_text().strip()] if pointer.is_file() else []
        for path in named + checkpoints(self.folder)[::-1]:
            if fault := damage(path):
                warnings.warn(f"{path} is not taken: {fault}", stacklevel=2)
            else:
                return path
        return None

    def load(self, model, optimizers) -> int:
        """Fill model and optimisers (one, or a list) from the newest checkpoint; the step after which it was made, 0 if
        there is none."""
        path = self.us.from_first(self.latest() if self.us.first else None)
        if path is None:
            return 0
        model_state, optimizer_state = get_state_dict(model, optimizers)
        state = {"model": model_state, "optimizer": optimizer_state}
        # How an optimizer runs (fused, capturable) is this machine's matter, not that of the one that wrote.
        optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers
        options = [{**group} for optimizer in optimizers for group in optimizer.param_groups]
        dcp.load(state, checkpoint_id=path, process_group=self.us.checkpoint_group)
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for group, own in zip((group for optimizer in optimizers for group in optimizer.param_groups), options):
            group.update(own)
        return step_of(path)

    def start(self, step: int, model, optimizers, valid_loss: float | None = None) -> None:
        """Copy the state and begin to write it; the training may go on. `valid_loss`: of this step, if it is known."""
        self.poll(wait=True)
        self.lowest = min(self.lowest, math.inf if valid_loss is None else valid_loss)
        path = self.folder / f"{WRITING}step-{step}"
        model_state, optimizer_state = get_state_dict(model, optimizers)
        done = dcp.async_save(
            {"model": model_state, "optimizer": optimizer_state},
            storage_writer=dcp.FileSystemWriter(path), process_group=self.us.checkpoint_group,
        )  # fmt: skip
        described = model.config, model.palette, Trained(step, valid_loss), model.class_names
        self.pending = path, getattr(done, "upload_completion", done), described

    def poll(self, wait: bool = False) -> None:
        """Put the checkpoint that is being written in its place, if it is whole by now (or `wait` for it).

        Raises OSError naming the last good one if it could not be written."""
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        (path, future, described), self.pending = self.pending, None
        step = described[2].step
        try:
            future.result()
            # The first process coordinates the writing: when its part is done, so is everybody's.
            if self.us.first:
                convert.describe(path, *described)
                self.publish(path, f"step-{step}")
        except (CheckpointException, RuntimeError, OSError) as error:
            raise OSError(
                f"checkpoint of step {step} could not be written in {self.folder}: {cause(error)}; the last good one "
                f"is {self.latest() or 'none'}"
            ) from error

    def publish(self, path: Path, name: str) -> None:
        sizes = {str(f.relative_to(path)): f.stat().st_size for f in path.rglob("*") if f.is_file()}
        write_durably(path / SIZES, json.dumps(sizes))
        if (self.folder / name).exists():  # a damaged one, or latest() would have taken it
            remove(self.folder / name)
        os.rename(path, self.folder / name)
        write_durably(self.folder / "latest", name)
        # A damaged one counts for none of those that are kept, nor is it ours to remove.
        there = [path for path in checkpoints(self.folder) if damage(path) is None]
        kept = {*there[-self.keep :], best(there)}
        for old in there:
            if old not in kept:
                remove(old)


def remove(path: Path) -> None:
    """A folder half removed must not look like a checkpoint."""
    going = path.with_name(GOING + path.name)
    os.rename(path, going)
    shutil.rmtree(going)


def write_durably(path: Path, text: str) -> None:
    """All of the text or none of it, even if the machine loses power."""
    beside = path.with_name(f"{path.name}.new")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def cause(error: BaseException) -> str:
    """The one line of an error that says why."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    while isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


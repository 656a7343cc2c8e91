"""A run directory: config.json, palette.npy, metrics.jsonl, checkpoints/, samples/, export/, and tokens/ where it has
encoded a folder."""

import fcntl
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from igpt.convert.tensors import read_json
from igpt.training.checkpoint import write_durably
from igpt.training.processes import Processes

OURS = {"config.json.new", "tokens"}  # what may be there before config.json is
LENGTH = {"train.steps", "train.warmup"}


def require_ours(run: Path, data: str) -> None:
    """Raises ValueError unless `run` is a run directory of the pictures `data`, or can become one: before anything is
    encoded into it."""
    if not (run / "config.json").is_file():
        if run.exists() and {entry.name for entry in run.iterdir()} - OURS:
            raise ValueError(f"run: {run} is not empty and has no config.json, expected a new or a run directory")
        return
    if (asked := read_json(run / "config.json").get("train")) is None:
        raise ValueError(f"run: {run} is a model, expected a new or a run directory")
    if (there := asked["data"]) != data:
        raise ValueError(f"run: {run} is a run of another configuration (train.data: {there} there, {data} asked)")


def claim(run: Path, config: dict) -> None:
    """Make `run` this configuration's directory, or check that it is; only its length may change, which is said.

    Raises ValueError showing the difference."""
    run.mkdir(parents=True, exist_ok=True)
    path, config = run / "config.json", json.loads(json.dumps(config))
    there, here = flat(json.loads(path.read_text())) if path.is_file() else {}, flat(config)
    differ = sorted(key for key in there | here if there.get(key) != here.get(key)) if there else []
    if differ and not {"train.steps"} <= set(differ) <= LENGTH:
        said = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} asked" for key in differ)
        raise ValueError(f"run: {run} is a run of another configuration ({said})")
    if differ:
        print(f"{run} had {there['train.steps']} steps and now has {here['train.steps']}: from its last checkpoint on "
              "the learning rate follows the new length's schedule", file=sys.stderr)  # fmt: skip
    if differ or not there:
        write_durably(path, json.dumps(config, indent=1) + "\n")


@contextmanager
def held(run: Path, us: Processes):
    """The run directory, for these processes alone; where the file system has no locks, for whoever comes. A new
    one that nothing was written to is gone again.

    Raises ValueError if other processes train in it: they would sweep away each other's checkpoints."""
    if not us.first:
        yield
        return
    is_new = not run.exists()
    run.mkdir(parents=True, exist_ok=True)
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise ValueError(f"run: {run} is being trained by another process, expected to wait for its end") from error
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(folder)
        if is_new and run.is_dir() and not any(run.iterdir()):
            run.rmdir()


def flat(nested: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    return {
        key: value
        for k, v in nested.items()
        for key, value in (flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}).items()
    }


class Metrics:
    """metrics.jsonl, the live line, and TensorBoard if asked for: written by the first process only."""

    def __init__(self, run: Path, start: int, steps: int, *, on: bool, flops_a_picture: float, peak: float | None,
                 tensorboard: bool):  # fmt: skip
        self.on, self.flops, self.peak = on, flops_a_picture, peak
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not on, mininterval=0.5)
        self.board, self.pictures, self.since, self.last = None, 0, time.perf_counter(), {}
        if not on:
            return
        lines = up_to(run / "metrics.jsonl", start)
        write_durably(run / "metrics.jsonl", "".join(lines))
        for line in lines:
            self.last.update(json.loads(line))
        self.file = open(run / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115  # open as long as the run is
        if tensorboard:
            self.board = summary_writer()(run / "tensorboard", purge_step=start + 1)

    @contextmanager
    def apart(self):
        """Time in here (validation, samples) is not training's."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def count(self, pictures: int) -> None:
        self.pictures += pictures
        self.bar.update()

    def trained(self, step: int, values: dict) -> None:
        """A training line. Its speed is that of the steps since the last one."""
        now = time.perf_counter()
        speed = self.pictures / (now - self.since)
        self.pictures, self.since = 0, now
        mfu = {"mfu": round(speed * self.flops / self.peak, 4)} if self.peak else {}
        self.write(step, {**values, "images_per_s": round(speed, 3), **mfu})

    def write(self, step: int, values: dict) -> None:
        row = {"step": step, **values, "time": round(time.time(), 3)}
        self.last.update(row)
        if not self.on:
            return
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            while line:  # a disk that fills up takes a part first
                line = line[self.file.write(line) :]
        except OSError as error:
            raise OSError(f"{self.file.name} could not be written: {error}") from error
        shown = [
            form.format(self.last[name])
            for name, form in {"loss": "loss {:.4f}", "valid_loss": "valid {:.4f}", "valid_accuracy": "{:.1%} right",
                               "images_per_s": "{:.1f} pictures/s", "mfu": "MFU {:.1%}"}.items()
            if name in self.last
        ]  # fmt: skip
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """On the disk, before a checkpoint that these lines belong to."""
        if self.on:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.bar.close()
        if self.on:
            self.file.close()
        if self.board is not None:
            self.board.close()


def up_to(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step: what a killed run logged past its checkpoint comes again."""
    if not path.is_file():
        return []
    # A line that the kill cut short has no end.
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in whole if json.loads(line)["step"] <= step]


def summary_writer():
    """TensorBoard's class. Raises ValueError if it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: it is not installed; pip install tensorboard") from error
    return SummaryWriter

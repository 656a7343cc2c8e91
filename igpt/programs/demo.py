"""`make demo`: train tiny on the built-in emoji for a few minutes, then complete emoji that it has never seen.

Writes demo_completions.png (one row an emoji: its upper half, four completions, the truth) and demo_loss.png. A demo:
1,472 pictures and a few minutes make a model that has learned colours, outlines and symmetry, not emoji.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from igpt import data, sample
from igpt.model import ImageGPT
from igpt.programs import train
from igpt.sample import grid

BATCH, LR = 8, 0.004  # many small steps: what counts in a few minutes is their number
ROWS, COMPLETIONS = 8, 4
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Options:
    """Train, complete, draw. An interrupted demo goes on; remove --run's directory to begin anew."""

    minutes: float = 3.0  # of training; the number of steps follows from this machine's speed
    size: int = 16  # pictures are size x size
    run: Path = Path("runs/demo")
    out: Path = Path("docs")  # where the two PNGs go
    seed: int = 0


def run(options: Options) -> dict:
    if not options.minutes > 0:
        raise ValueError(f"minutes: got {options.minutes}, expected a positive number")
    steps, dtype = plan(options)
    trained = train.run(train.Options(
        run=options.run, preset="tiny", size=options.size, steps=steps, batch=BATCH, lr=LR, dtype=dtype,
        seed=options.seed, valid_pictures=64, sample_every=0, device="cpu",
    ))  # fmt: skip
    if "export" not in trained:
        return trained
    completions, loss = options.out / "demo_completions.png", options.out / "demo_loss.png"
    complete(trained["export"], options, completions)
    curve(options.run / "metrics.jsonl", loss)
    return {**trained, "completions": str(completions), "curve": str(loss)}


def plan(options: Options) -> tuple[int, str]:
    """(steps, dtype): those of the run that goes on, or what this machine does in the time, in its faster dtype."""
    config = options.run / "config.json"
    if config.is_file():
        asked = json.loads(config.read_text())["train"]
        return asked["steps"], asked["dtype"]
    seconds = {dtype: step_seconds(options.size, dtype == "bf16") for dtype in ("fp32", "bf16")}
    dtype = min(seconds, key=seconds.get)
    return max(20, round(60 * options.minutes / seconds[dtype])), dtype


def step_seconds(size: int, bf16: bool) -> float:
    model = ImageGPT.from_preset("tiny", n_ctx=size * size)
    tokens = torch.randint(0, model.config.vocab, (BATCH, size * size))
    times = []
    for _ in range(8):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model.loss(tokens).backward()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def complete(export: str, options: Options, path: Path) -> None:
    """The lower half of held-out emoji, evenly chosen from Unicode's order."""
    model = ImageGPT.from_pretrained(export, device="cpu")
    test = data.load("builtin:emoji", "test", size=options.size).encoded()
    chosen = np.linspace(0, len(test) - 1, ROWS).round().astype(int)
    truth = torch.from_numpy(test.tokens[chosen].astype(np.int64))
    keep = test.n_ctx // 2
    asked = truth.repeat_interleave(COMPLETIONS, 0)
    tokens = sample.complete(model, asked, keep, temperature=TEMPERATURE, seed=options.seed)
    images = grid.beside(test.palette.decode(truth, test.size), test.palette.decode(tokens, test.size), keep)
    grid.save(path, images, columns=2 * (COMPLETIONS + 2), scale=96 // options.size)


def curve(metrics: Path, path: Path) -> None:
    """Loss over steps, training and validation."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training (one batch)", {"linewidth": 0.8}),
                               ("valid_loss", "emoji held out", {"marker": "o"})):  # fmt: skip
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), label=label, **style)
    axes.axhline(np.log(512), color="grey", linestyle=":", label="ln 512, knowing nothing")
    axes.set(xlabel="step", ylabel="nats a pixel", ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    import tyro

    print(json.dumps(run(tyro.cli(Options, prog="python -m igpt.programs.demo"))))


if __name__ == "__main__":
    main()

"""The program `igpt demo`: train tiny on the built-in emoji for a few minutes, then complete emoji it has never seen.

Writes completions.png (one row an emoji: its upper half, four completions, the truth) and loss.png into the run's
directory. A demo: 1,472 pictures and a few minutes make a model that has learned colours, outlines and symmetry, not
emoji.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from igpt import data, sample
from igpt.convert.tensors import read_json
from igpt.model import ImageGPT
from igpt.programs import train
from igpt.sample import grid

BATCH, LR = 8, 0.004  # many small steps: what counts in a few minutes is their number
ROWS, COMPLETIONS = 8, 4
TEMPERATURE = 0.9


@dataclass(frozen=True)
class Options:
    """Train on the built-in pictures, complete, draw: on the CPU, into --run's directory. An interrupted demo goes on;
    remove that directory to begin anew."""

    minutes: float = 3.0  # of training; the number of steps follows from this machine's speed
    size: int = 16  # pictures are size x size
    run: Path = Path("runs/demo")  # the run, and two PNGs
    seed: int = 0


def run(options: Options) -> dict:
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"minutes: got {options.minutes}, expected a positive number")
    if options.size < 2:
        raise ValueError(f"size: got {options.size}, expected at least 2, of which half is given")
    steps, dtype = plan(options)
    trained = train.run(train.Options(
        run=options.run, preset="tiny", size=options.size, steps=steps, batch=BATCH, lr=LR, dtype=dtype,
        seed=options.seed, valid_pictures=64, sample_every=0, device="cpu",
    ))  # fmt: skip
    if "export" not in trained:
        return trained
    completions, loss = options.run / "completions.png", options.run / "loss.png"
    complete(trained["export"], options, completions)
    curve(options.run / "metrics.jsonl", loss)
    return {**trained, "completions": str(completions), "curve": str(loss)}


def plan(options: Options) -> tuple[int, str]:
    """(steps, dtype): those of the run that goes on, or what this machine does in the time, in its faster dtype."""
    config = options.run / "config.json"
    if asked := read_json(config).get("train") if config.is_file() else None:
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
    grid.save(path, images, columns=2 * (COMPLETIONS + 2), scale=max(1, 96 // options.size))


def curve(metrics: Path, path: Path) -> None:
    """Loss over steps as a PNG: training in blue, validation in red, ln 512 dotted."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps, top, fine = rows[-1]["step"], math.log(512), 4  # drawn `fine` times as large: smooth lines
    left, right, high, low = 40, 580, 20, 310

    def at(step: float, nats: float) -> tuple[float, float]:
        return left + (right - left) * step / steps, low - (low - high) * nats / (1.1 * top)

    image = Image.new("RGB", (600 * fine, 340 * fine), "white")
    draw = ImageDraw.Draw(image)

    def line(points, colour: str, width: float) -> None:
        draw.line([(fine * x, fine * y) for x, y in points], colour, round(fine * width), joint="curve")

    for nats in range(7):
        line([at(0, nats), at(steps, nats)], "lightgrey", 0.5)
    for dash in range(0, 100, 2):
        line([at(steps * dash / 100, top), at(steps * (dash + 1) / 100, top)], "grey", 1)
    for name, colour, width in (("loss", "steelblue", 0.8), ("valid_loss", "firebrick", 2)):
        line([at(row["step"], row[name]) for row in rows if name in row], colour, width)
    image = image.resize((600, 340), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    for nats in range(7):
        draw.text(at(0, nats), f"{nats} ", "black", anchor="rm")
    for part in range(5):
        draw.text(at(steps * part / 4, -0.2), f"{steps * part / 4:.0f}", "black", anchor="ma")
    draw.text(at(steps, top), "ln 512, knowing nothing", "grey", anchor="rd")
    draw.text((right, high + 70), "training, one batch", "steelblue", anchor="rd")
    draw.text((right, high + 85), "emoji held out", "firebrick", anchor="rd")
    draw.text((left, high - 4), "nats a pixel, over steps", "black", anchor="ld")
    image.save(path)

"""Palette encoding of whole pictures: ours against Hugging Face's processor, in pictures a second."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from bench import cost
from bench.cases import Case, palette_cube
from bench.machine import ceilings, stamp
from bench.measure import Run
from bench.peers import importable
from bench.rows import Row
from bench.timing import Stats, interleaved
from igpt import Palette, data

SIDE = 32


def pictures(count: int) -> np.ndarray:
    """The built-in pictures, uint8 (count, 32, 32, 3), repeated as needed."""
    images = data.load("builtin:emoji", "train+valid").images
    return images[np.arange(count) % len(images)]


def rows(run: Run, count: int = 4096, theirs: int = 256) -> Iterator[Row]:
    """Ours with its table built, ours building it each time, and the processor (PIL variant) on fewer pictures, its
    time scaled up: its time is linear in them."""
    images, palette = pictures(count), Palette(palette_cube())
    case = Case("palette pictures", count, SIDE * SIDE, 0, 0, "fp32", direction="fwd")
    variants = {
        "ours": lambda: palette.encode(images),
        "ours, building": lambda: Palette(palette_cube()).encode(images),
    }
    notes = {
        "ours": "the table, which fills as colours come, has seen these",
        "ours, building": "a new palette each time: every table is built anew",
    }
    scale, absent = {}, []
    if importable("transformers"):
        from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

        processor = ImageGPTImageProcessorPil(
            clusters=palette.centres.numpy(), size={"height": SIDE, "width": SIDE}, do_normalize=True
        )
        few = list(images[:theirs])
        variants["hugging face"] = lambda: processor(few, return_tensors="np")
        scale["hugging face"] = count / theirs
        notes["hugging face"] = f"ImageGPTImageProcessorPil on {theirs} pictures, time scaled to {count}"
    else:
        absent.append("hugging face")
    timed = interleaved(variants, run.timer, run.case_s, run.least)
    times = {
        name: Stats(t.median * (k := scale.get(name, 1.0)), t.p20 * k, t.p80 * k, t.runs) for name, t in timed.items()
    }
    moved = cost.Cost(0, count * SIDE * SIDE * (3 + 8))
    floor = ceilings("cpu").floor_ms(moved, "fp32")
    for name, t in times.items():
        ratios = {"hugging face": times["hugging face"].median / t.median} if name != "hugging face" and scale else {}
        yield Row(
            "model", impl=name, **case.labels, **stamp("cpu"), median_ms=t.median, p20_ms=t.p20, p80_ms=t.p80,
            runs=t.runs, bytes=moved.bytes, floor_ms=floor, pct_floor=100 * floor / t.median,
            per_s=1e3 * count / t.median, unit="pictures", ratios=ratios, note=notes[name],
        )  # fmt: skip
    for name in absent:
        row = Row("model", impl=name, **case.labels, **stamp("cpu"))
        yield dataclasses.replace(row, note="absent: transformers is not installed")

"""The program `igpt palette`: the colours of a picture set by k-means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from igpt import data
from igpt.machine import device_of
from igpt.palette import Palette
from igpt.programs.source import spread


@dataclass(frozen=True)
class Options:
    """Fit k colours to the pixels of a set's training pictures; report the error on pictures held out."""

    data: str  # builtin:emoji, a folder of pictures, CIFAR, STL-10 or IDX (igpt.data.load)
    out: Path = Path("palette.npy")  # OpenAI's format: fp32 (k, 3) in [-1, 1]
    force: bool = False  # replace a file at --out
    k: int = 512
    size: int | None = None  # pictures become size x size first; default: 32
    limit: int = 20_000  # at most so many pictures, evenly spread over the set
    seed: int = 0
    skip_bad: bool = False  # leave unreadable picture files out and count them; default: stop at the first
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where the k-means runs: the same colours on either


def run(options: Options) -> dict:
    if options.limit < 1:
        raise ValueError(f"limit: got {options.limit}, expected at least 1")
    if options.out.suffix != ".npy" or not options.out.parent.is_dir():
        raise ValueError(f"out: got {options.out}, expected a name that ends in .npy, in a folder that exists")
    if options.out.exists() and not (options.force and options.out.is_file()):
        raise ValueError(f"out: {options.out} is there already; --force replaces a file")
    device = device_of(options.device)
    sets = [
        data.load(options.data, split, size=options.size, skip_bad=options.skip_bad, workers=None,
                  pick=lambda n: spread(n, options.limit))
        for split in ("train", "valid")
    ]  # fmt: skip
    for pictures in sets:
        if pictures.images is None:
            raise ValueError(f"data: {pictures.name} holds tokens only, expected pictures")
    train, valid = (pictures.images for pictures in sets)
    pixels = torch.from_numpy(train).to(device) if device.type == "cuda" else train
    palette = Palette.fit(pixels, options.k, options.seed)
    palette.save(options.out)
    return {
        "out": str(options.out), "k": options.k, "fingerprint": palette.fingerprint, "pictures": len(train),
        "mse": mse(palette, train), "valid_mse": mse(palette, valid),
    }  # fmt: skip


def mse(palette: Palette, images: np.ndarray) -> float | None:
    """Mean squared distance of a pixel from its colour, in units of 8-bit values, over the three channels; None of no
    pictures."""
    if not len(images):
        return None
    again = palette.decode(palette.encode(images), images.shape[1:3]).numpy()
    return round(float(np.square(again.astype(np.float32) - images).sum(-1).mean()), 3)

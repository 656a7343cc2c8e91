"""What the programs that sample have in common: the model, how pixels are drawn, and batches with a bar."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from igpt.palette import Palette
from igpt.programs.source import OfRun
from igpt.programs.writing import Writer
from igpt.sample import batch_of, decoder_of


@dataclass(frozen=True)
class Sampling(OfRun):
    """How the programs load a model and draw pixels."""

    model: str  # builtin:emoji, our directory, a run's, a Hugging Face directory or hub id, or an OpenAI prefix
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the model's own
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int | None = None  # draw from the k likeliest colours only
    top_p: float | None = None  # draw from the likeliest colours that together reach this probability
    seed: int = 0  # the same seed gives the same pictures, whatever --batch
    batch: int | None = None  # pictures decoded at once, at most; default: 128 on a GPU, 32 on a CPU, if they fit
    weights: Literal["bf16", "int8"] | None = None  # default: the parameters' dtype, but bf16 for fp32 on a GPU
    cache_dtype: Literal["fp32", "bf16", "fp8"] | None = None  # of the cache; default: fp32 on a CPU, bf16 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scale: int = 4  # each pixel of a picture is scale x scale pixels of the PNG
    force: bool = False  # replace a file at --out that is no picture of igpt's

    def load(self):
        """(model, palette, (height, width)). Raises ValueError if they don't fit together."""
        for name in ("batch", "scale"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        return drawable(self.pretrained(self.model, self.device), self)

    def run_batches(self, model, n: int, pixels: int, sample: Callable, write: Callable) -> dict:
        """sample(start, stop, **options) -> tokens, for slices of n pictures of which `pixels` are drawn each, and
        write(tokens) of all so far as they come. The slices are of one size, for one decoder: the last one goes over
        pictures of the one before it again."""
        weights = self.weights or ("bf16" if model.wte.is_cuda and model.wte.dtype == torch.float32 else None)
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        how = {"weights": weights, "cache_dtype": self.cache_dtype}
        batch, began = batch_of(model, n, self.batch, **how), time.perf_counter()
        decoder = decoder_of(model, batch, total=n, **how)
        form = "{percentage:3.0f}%|{bar}| {n:.2f}/{total:.0f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
        shown = tqdm(total=n * pixels, unit=" pictures", unit_scale=1 / pixels, bar_format=form)
        with Writer(write) as writer, shown as bar:
            for start in range(0, n, batch):
                first, new = min(start, n - batch), min(batch, n - start)
                options = {"first": first, "progress": lambda _, new=new: bar.update(new), "decoder": decoder, **drawn}
                writer.put(sample(first, first + batch, **options)[-new:].cpu())
            seconds = time.perf_counter() - began
        return {"pictures": n, "seconds": round(seconds, 3), "pictures_per_s": round(n / seconds, 4)}


def drawable(model, options):
    """(model, palette, (height, width)) of a model whose pictures are to be seen, by the options `model` and `palette`.

    Raises ValueError if they don't fit together."""
    side = math.isqrt(model.config.n_ctx)
    if side * side != model.config.n_ctx:
        raise ValueError(f"model: got n_ctx {model.config.n_ctx}, expected a square number of pixels")
    palette = Palette.load(options.palette) if options.palette else model.palette
    if palette is None:
        raise ValueError(f"palette: {options.model} came without one, expected --palette")
    return model, palette.require(model.config.vocab), (side, side)

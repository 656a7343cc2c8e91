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
from igpt.sample import decoder_of


@dataclass(frozen=True)
class Sampling(OfRun):
    """How the programs load a model and draw pixels."""

    model: str  # builtin:emoji, our directory, a run's, a Hugging Face directory or hub id, or an OpenAI prefix
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the model's own
    temperature: float = 1.0  # divides the logits; 0 is greedy
    top_k: int | None = None  # draw from the k likeliest colours only
    top_p: float | None = None  # draw from the likeliest colours that together reach this probability
    seed: int = 0  # the same seed gives the same pictures, whatever --batch
    batch: int = 16  # pictures decoded at once
    weights: Literal["bf16", "int8"] | None = None  # default: the parameters' dtype, but bf16 for fp32 on a GPU
    cache_dtype: Literal["fp32", "bf16", "fp8"] | None = None  # of the cache; default: fp32 on a CPU, bf16 on a GPU
    device: Literal["auto", "cpu", "cuda"] = "auto"
    scale: int = 4  # each pixel of a picture is scale x scale pixels of the PNG
    force: bool = False  # replace a file at --out that is no picture of igpt's

    def load(self):
        """(model, palette, (height, width)). Raises ValueError if they don't fit together."""
        for name in ("batch", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        return drawable(self.pretrained(self.model, self.device), self)

    def run_batches(self, model, n: int, pixels: int, sample: Callable) -> tuple[torch.Tensor, dict]:
        """sample(start, stop, **options) -> tokens, for slices of n pictures of which `pixels` are drawn each."""
        weights = self.weights or ("bf16" if model.wte.is_cuda and model.wte.dtype == torch.float32 else None)
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "seed": self.seed}
        began, done, decoder = time.perf_counter(), [], None
        form = "{percentage:3.0f}%|{bar}| {n:.2f}/{total:.0f} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
        with tqdm(total=n * pixels, unit=" pictures", unit_scale=1 / pixels, bar_format=form) as bar:
            for start in range(0, n, self.batch):
                stop = min(start + self.batch, n)
                if decoder is None or decoder.batch != stop - start:
                    how = {"weights": weights, "cache_dtype": self.cache_dtype, "total": n}
                    decoder = decoder_of(model, stop - start, **how)
                done.append(sample(start, stop, first=start, progress=bar.update, decoder=decoder, **drawn).cpu())
        seconds = time.perf_counter() - began
        return torch.cat(done), {"pictures": n, "seconds": round(seconds, 3), "pictures_per_s": round(n / seconds, 4)}


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

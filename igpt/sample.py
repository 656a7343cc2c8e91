"""Sampling whole pictures, and the rest of pictures whose first pixels are given; the program `igpt sample`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from igpt import grid
from igpt.decode import decoder_of
from igpt.draw import Sampler


def generate(model, batch: int = 1, **options) -> torch.Tensor:
    """Sample whole pictures: tokens (batch, n_ctx) int64. Options as in `complete`."""
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: got {batch!r}, expected a positive integer")
    return _continue(model, torch.empty(batch, 0, dtype=torch.int64), **options)


def complete(model, tokens_BN, keep: int, **options) -> torch.Tensor:
    """Keep the first `keep` pixels (raster order) of each picture and sample the rest: tokens (B, n_ctx) int64.

    temperature   divides the logits; 0 takes the likeliest token each time (greedy). Default 1.
    top_k, top_p  only the k likeliest tokens; only the likeliest that together reach the mass p. Default: all.
    seed, first   picture i draws from the counters of (seed, first + i): the same pictures whatever the batch split. On
                  a GPU logits of up to 8 pictures and of more differ by roundings: a decoder made with `total`
                  pictures in all keeps a split to one kind.
    weights       None (the parameters' dtype), "bf16", or "int8" with one scale an output channel.
    cache_dtype   None (fp32 on a CPU, the weights' dtype on a GPU), "fp32", "bf16" or "fp8".
    progress      called after each position with the number of pixels just drawn, B.
    decoder       one that decoder_of made for this model and batch (weights and cache_dtype are then its own): what it
                  prepares, on a GPU a CUDA graph, is not prepared again.

    Raises ValueError for a bad option, a keep of 0 or all, tokens of another size or range, a BERT model, and a batch
    whose cache doesn't fit, before any work."""
    c = model.config
    if tokens_BN.dim() != 2 or tokens_BN.shape[1] != c.n_ctx or tokens_BN.shape[0] < 1:
        raise ValueError(f"tokens: got shape {tuple(tokens_BN.shape)}, expected (B, {c.n_ctx})")
    if tokens_BN.is_floating_point() or tokens_BN.dtype == torch.bool:
        raise ValueError(f"tokens: got {tokens_BN.dtype}, expected integers in [0, {c.vocab})")
    if not isinstance(keep, int) or not 0 < keep < c.n_ctx:
        raise ValueError(f"keep: got {keep!r}, expected 1 to {c.n_ctx - 1} of the {c.n_ctx} pixels")
    kept = tokens_BN[:, :keep]
    low, high = (int(t) for t in torch.aminmax(kept.long()))
    if low < 0 or high >= c.vocab:
        raise ValueError(f"tokens: got values in [{low}, {high}], expected integers in [0, {c.vocab})")
    return _continue(model, kept, **options)


def log_likelihood(model, tokens_BN, *, weights: str | None = None, cache_dtype: str | None = None) -> torch.Tensor:
    """Log-probability in nats of each pixel, fp32 or wider (B, N), computed one pixel at a time as sampling does: what
    int8 weights or an fp8 cache cost is its difference from the full forward's."""
    decoder = decoder_of(model, tokens_BN.shape[0], weights=weights, cache_dtype=cache_dtype)
    steps = [
        decoder.step(i, tokens_BN[:, i - 1]).log_softmax(-1).gather(-1, tokens_BN[:, i : i + 1].long())
        for i in range(tokens_BN.shape[1])
    ]
    return torch.cat(steps, 1)


def _continue(
    model, kept_BK, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    seed: int = 0, first: int = 0, weights: str | None = None, cache_dtype: str | None = None, progress=None,
    decoder=None,
):  # fmt: skip
    n_ctx, device, (B, keep) = model.config.n_ctx, model.wte.device, kept_BK.shape
    sampler = Sampler(temperature, top_k, top_p, seed, first).check(model.config.vocab)
    if decoder is None:
        decoder = decoder_of(model, B, weights=weights, cache_dtype=cache_dtype)
    elif decoder.batch != B:
        raise ValueError(f"decoder: got one for {decoder.batch} pictures, expected {B}")
    tokens = torch.zeros(B, n_ctx, dtype=torch.int64, device=device)
    tokens[:, :keep] = kept_BK
    with torch.autocast(device.type, enabled=False):
        if keep:
            decoder.prefill(tokens[:, :keep])
        decoder.sample(tokens, keep, n_ctx, sampler, progress)
    return tokens


@dataclass(frozen=True)
class Sampling:
    """How the programs load a model and draw pixels."""

    model: str  # our directory, a Hugging Face directory or hub id, or an OpenAI checkpoint prefix
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

    def load(self):
        """(model, palette, (height, width)). Raises ValueError if they don't fit together."""
        from igpt.model import ImageGPT
        from igpt.palette import Palette
        from igpt.source import device_of

        for name in ("batch", "scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        model = ImageGPT.from_pretrained(self.model, device=device_of(self.device))
        side = math.isqrt(model.config.n_ctx)
        if side * side != model.config.n_ctx:
            raise ValueError(f"model: got n_ctx {model.config.n_ctx}, expected a square number of pixels")
        palette = Palette.load(self.palette) if self.palette else model.palette
        if palette is None:
            raise ValueError(f"palette: {self.model} came without one, expected --palette")
        return model, palette.require(model.config.vocab), (side, side)

    def run_batches(self, model, n: int, pixels: int, sample: Callable) -> tuple[torch.Tensor, dict]:
        """sample(start, stop, **options) -> tokens, for slices of n pictures of which `pixels` are drawn each."""
        from tqdm import tqdm

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


@dataclass(frozen=True)
class Options(Sampling):
    """Sample pictures and tile them into one PNG."""

    n: int = 16  # how many pictures
    out: Path = Path("samples.png")
    columns: int | None = None  # of the grid; default: as square as it gets


def run(options: Options) -> dict:
    if options.n < 1:
        raise ValueError(f"n: got {options.n}, expected at least 1")
    if options.columns is not None and options.columns < 1:
        raise ValueError(f"columns: got {options.columns}, expected at least 1")
    grid.prepare(options.out)
    model, palette, size = options.load()
    tokens, report = options.run_batches(
        model, options.n, model.config.n_ctx, lambda start, stop, **how: generate(model, stop - start, **how)
    )
    columns = options.columns or math.ceil(math.sqrt(options.n))
    path = grid.save(options.out, palette.decode(tokens, size), columns, scale=options.scale)
    return {"out": str(path), **report}

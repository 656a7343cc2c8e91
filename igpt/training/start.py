"""Where a training starts: its model, of a preset or of a checkpoint, and the first weights."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from igpt.config import PRESETS, Config, preset
from igpt.convert import Checkpoint, open_checkpoint, runs
from igpt.data import Pictures
from igpt.model import ImageGPT


def checkpoint_of(options) -> Checkpoint | None:
    """What --init names, or None. A run that has a checkpoint of its own asks that one: the other may be gone."""
    if options.init is None:
        if options.interpolate:
            raise ValueError("interpolate: got it without --init, expected a checkpoint whose positions to interpolate")
        return None
    own = any(runs.damage(path) is None for path in runs.checkpoints(options.run / runs.FOLDER))
    return open_checkpoint(options.run, "last") if own else open_checkpoint(options.init)


def preset_of(config: Config) -> str | None:
    sizes = {(c.n_layer, c.width, c.heads): name for name, c in PRESETS.items()}
    return sizes.get((config.n_layer, config.width, config.heads))


def config_of(options, init: Checkpoint | None, pictures: Pictures) -> Config:
    """The model to train on these pictures: the preset's, or that of `init`, without a classifier.

    Raises ValueError naming the option that asks for another model than `init`, or the pictures that it can't take."""
    if init is None:
        asked = {"n_layer": options.layers, "width": options.width, "heads": options.heads, "vocab": pictures.vocab}
        return preset(
            options.preset, n_ctx=pictures.n_ctx, objective=options.objective, norm=options.norm,
            **{k: v for k, v in asked.items() if v is not None},
        )  # fmt: skip
    c, differs = init.config, f"but {options.init} has"
    there = {"layers": c.n_layer, "width": c.width, "heads": c.heads, "objective": c.objective, "norm": c.norm}
    there |= {"preset": named} if (named := preset_of(c)) else {}
    for name, value in there.items():
        if (here := getattr(options, name)) not in (None, value):
            raise ValueError(f"{name}: got {here!r}, {differs} {value!r}, expected the same")
    if pictures.vocab != c.vocab:
        raise ValueError(f"palette: got {pictures.vocab} colours, {differs} {c.vocab}, expected the same")
    if None not in (init.palette, pictures.palette) and init.palette != pictures.palette:
        raise ValueError(f"palette: got {pictures.palette}, {differs} {init.palette}, expected its own")
    if pictures.n_ctx != c.n_ctx and not options.interpolate:
        raise ValueError(
            f"size: got pictures of {pictures.size}, n_ctx {pictures.n_ctx}, {differs} n_ctx {c.n_ctx}, expected the "
            "same, or --interpolate"
        )
    if pictures.n_ctx != c.n_ctx and math.isqrt(c.n_ctx) ** 2 != c.n_ctx:
        raise ValueError(f"interpolate: {options.init} has n_ctx {c.n_ctx}, expected a square number")
    return replace(c, n_ctx=pictures.n_ctx, classes=0)


@torch.no_grad()
def fill(model: ImageGPT, init: Checkpoint | None, size: tuple[int, int], seed: int) -> None:
    """The weights before the first step: random ones that depend on the seed only, or those of `init`, their positions
    interpolated where the pictures are of another `size`."""
    if init is None:
        model.init_weights(torch.Generator().manual_seed(seed))
        return
    for name, parameter in model.named_parameters():
        tensor = init.tensors[name].read()
        parameter.copy_(tensor if tensor.shape == parameter.shape else interpolated(tensor, size))


def interpolated(wpe: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Embeddings of the positions of a square, (N, d), for height x width of them, (h w, d): bicubic in the plane."""
    side = math.isqrt(len(wpe))
    plane = wpe.float().t().unflatten(1, (side, side))[None]
    return F.interpolate(plane, size, mode="bicubic", antialias=True)[0].flatten(1).t()

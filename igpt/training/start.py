"""Where a training starts: its model, of a preset or of a checkpoint, and the first weights."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from igpt.config import PRESETS, VITS, Blocks, Config, ViTConfig, preset
from igpt.convert import Checkpoint, open_checkpoint, runs
from igpt.data import Pictures
from igpt.model import Transformer


def checkpoint_of(options) -> Checkpoint | None:
    """What --init names, or None. A run that has a checkpoint of its own asks that one: the other may be gone."""
    if options.init is None:
        if options.interpolate:
            raise ValueError("interpolate: got it without --init, expected a checkpoint whose positions to interpolate")
        return None
    own = any(runs.damage(path) is None for path in runs.checkpoints(options.run / runs.FOLDER))
    return open_checkpoint(options.run, "last") if own else open_checkpoint(options.init)


def preset_of(config: Blocks) -> str | None:
    """The named size that has these blocks (and patches)."""

    def size(c: Blocks) -> tuple:
        return type(c), c.n_layer, c.width, c.heads, getattr(c, "patch", None)

    return next((name for name, c in (PRESETS | VITS).items() if size(c) == size(config)), None)


def require_same(options, init: Checkpoint, **there) -> None:
    """Raises ValueError naming an option that asks for another model than `init`, which has the values `there`."""
    for name, value in there.items():
        if (here := getattr(options, name)) not in (None, value):
            raise ValueError(f"{name}: got {here!r}, but {options.init} has {value!r}, expected the same")


def vit_config_of(options, init: Checkpoint | None, pictures: Pictures) -> ViTConfig:
    """The ViT to train on these pictures: the named one, or that of `init` under this objective and these labels.

    Raises ValueError naming the option that asks for another model than `init`, or the pictures that it can't take."""
    ends = {"size": pictures.size[0], "objective": options.objective}
    ends["classes"] = len(pictures.classes) if options.objective == "labels" else 0
    if init is None:
        asked = {"n_layer": options.layers, "width": options.width, "heads": options.heads}
        return preset(options.model, VITS, **ends, **{k: v for k, v in asked.items() if v is not None})
    c = init.config
    named = {"model": name} if (name := preset_of(c)) else {}
    require_same(options, init, layers=c.n_layer, width=c.width, heads=c.heads, **named)
    if ends["size"] != c.size and not options.interpolate:
        raise ValueError(
            f"size: got {ends['size']}, but {options.init} has {c.size}, expected the same, or --interpolate"
        )
    return replace(c, pooler=False, **ends)


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
    named = {"preset": name} if (name := preset_of(c)) else {}
    require_same(
        options, init, layers=c.n_layer, width=c.width, heads=c.heads, objective=c.objective, norm=c.norm, **named
    )
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
def fill(
    model: Transformer, init: Checkpoint | None, plane: tuple[int, int], seed: int, fresh: tuple[str, ...] = ()
) -> None:
    """The weights before the first step: random ones that depend on the seed only, or those of `init` but for the names
    in `fresh`; positions of another size are interpolated to `plane`."""
    model.init_weights(torch.Generator().manual_seed(seed))
    if init is None:
        return
    for name, parameter in model.named_parameters():
        if name in init.tensors and name not in fresh:
            tensor = init.tensors[name].read()
            parameter.copy_(tensor if tensor.shape == parameter.shape else interpolated(tensor, plane, len(parameter)))


def interpolated(wpe: torch.Tensor, plane: tuple[int, int], rows: int | None = None) -> torch.Tensor:
    """Embeddings of the positions of a square, (N, d), for height x width of them, (h w, d): bicubic in the plane. Of
    `rows` those beyond h w, a class token's, come first and stay as they are."""
    outside = 0 if rows is None else rows - math.prod(plane)
    side = math.isqrt(len(wpe) - outside)
    square = wpe[outside:].float().t().unflatten(1, (side, side))[None]
    inside = F.interpolate(square, plane, mode="bicubic", antialias=True)[0].flatten(1).t()
    return torch.cat([wpe[:outside].float(), inside])

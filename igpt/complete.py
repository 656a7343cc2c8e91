"""The program `igpt complete`: your own pictures, the first rows kept, the rest sampled, beside the truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from igpt import grid, sample

HIDDEN = 128  # grey: the pixels that the model has to make up


@dataclass(frozen=True)
class Options(sample.Sampling):
    """Complete picture files. One row a picture: what is kept, the completions, the truth in the palette's colours."""

    pictures: tuple[Path, ...] = ()  # the files
    keep: float = 0.5  # the fraction of pixels that is given, from the top
    completions: int = 4  # of each picture
    resize: bool = False  # take the centre square of pictures of another size, scaled down to the model's
    out: Path = Path("completions.png")


def run(options: Options) -> dict:
    if not options.pictures:
        raise ValueError("pictures: got none, expected at least one file")
    if options.completions < 1:
        raise ValueError(f"completions: got {options.completions}, expected at least 1")
    if not 0 < options.keep < 1:
        raise ValueError(f"keep: got {options.keep}, expected a fraction between 0 and 1, both excluded")
    model, palette, size = options.load()
    keep = round(options.keep * model.config.n_ctx)
    truth = palette.encode(np.stack([read(path, size, options.resize) for path in options.pictures]))
    asked = truth.repeat_interleave(options.completions, 0)
    completed, report = options.run_batches(
        model, len(asked), model.config.n_ctx - keep,
        lambda start, stop, **how: sample.complete(model, asked[start:stop], keep, **how),
    )  # fmt: skip
    whole = palette.decode(truth, size)
    hidden = whole.clone()
    hidden.flatten(1, 2)[:, keep:] = HIDDEN
    completed = palette.decode(completed, size).unflatten(0, (len(truth), -1))
    rows = torch.cat([hidden[:, None], completed, whole[:, None]], 1)
    path = grid.save(options.out, rows.flatten(0, 1), options.completions + 2, scale=options.scale)
    return {"out": str(path), "kept_pixels": keep, **report}


def read(path: Path, size: tuple[int, int], resize: bool) -> np.ndarray:
    """A picture file as uint8 (H, W, 3), transparency on white. Raises ValueError for a picture of another size unless
    `resize`."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.size != (size[1], size[0]):
        if not resize:
            raise ValueError(f"{path}: got {image.width} x {image.height}, expected {size[1]} x {size[0]}, or --resize")
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BOX)
    return np.asarray(image)

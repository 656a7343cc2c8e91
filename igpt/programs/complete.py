"""The program `igpt complete`: your own pictures, the first rows kept, the rest sampled, beside the truth."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from igpt.data.crops import fitted, open_picture
from igpt.data.folder import warn_of_bad
from igpt.programs.sampling import Sampling
from igpt.programs.source import say
from igpt.sample import complete, grid


@dataclass(frozen=True)
class Options(Sampling):
    """Complete picture files. One row a picture: what is kept, the completions, the truth in the palette's colours."""

    pictures: tuple[Path, ...] = ()  # the files
    keep: float = 0.5  # the fraction of pixels that is given, from the top
    completions: int = 4  # of each picture
    resize: bool = True  # pictures of another size, to their middle square (the paper's evaluation crop), resized
    skip_bad: bool = False  # leave unreadable files out and count them; default: stop at the first
    out: Path = Path("completions.png")


def run(options: Options) -> dict:
    if not options.pictures:
        raise ValueError("pictures: got none, expected at least one file")
    if options.completions < 1:
        raise ValueError(f"completions: got {options.completions}, expected at least 1")
    if not 0 < options.keep < 1:
        raise ValueError(f"keep: got {options.keep}, expected a fraction between 0 and 1, both excluded")
    grid.prepare(options.out, options.force)
    model, palette, size = options.load()
    keep = round(options.keep * model.config.n_ctx)
    truth = palette.encode(np.stack(read(options, size[0])))
    asked = truth.repeat_interleave(options.completions, 0)

    def write(completed) -> None:
        rows = len(completed) // options.completions  # that are whole
        if rows:
            done = palette.decode(completed[: rows * options.completions], size)
            images = grid.beside(palette.decode(truth[:rows], size), done, keep)
            grid.save(options.out, images, options.completions + 2, scale=options.scale)

    report = options.run_batches(
        model, len(asked), model.config.n_ctx - keep,
        lambda start, stop, **how: complete(model, asked[start:stop], keep, **how), write,
    )  # fmt: skip
    return {"out": str(options.out), "kept_pixels": keep, **report}


def read(options: Options, side: int) -> list[np.ndarray]:
    """The files as uint8 (side, side, 3). Raises ValueError for an unreadable one unless `skip_bad`, or one of another
    size unless `resize`."""
    squares, bad = [], []
    for path in options.pictures:
        try:
            picture = open_picture(path)
        except ValueError:
            if not options.skip_bad:
                raise
            bad.append(str(path))
            continue
        if picture.size != (side, side):
            if not options.resize:
                got = f"{picture.width} x {picture.height}"
                raise ValueError(f"{path}: got {got}, expected {side} x {side} without --resize")
            say(f"pictures of another size are taken by their middle square, resized to {side} x {side}")
        squares.append(fitted(picture, side))
    if not squares:
        raise ValueError(f"pictures: none of the {len(bad)} files can be read")
    warn_of_bad("pictures", bad, len(options.pictures))
    return squares

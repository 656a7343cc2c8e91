"""The program `igpt sample`: pictures out of nothing, tiled into one PNG."""

import math
from dataclasses import dataclass
from pathlib import Path

from igpt.programs.sampling import Sampling
from igpt.sample import generate, grid


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
    grid.prepare(options.out, options.force)
    model, palette, size = options.load()
    columns = options.columns or math.ceil(math.sqrt(options.n))
    report = options.run_batches(
        model, options.n, model.config.n_ctx,
        lambda start, stop, **how: generate(model, stop - start, **how),
        lambda tokens: grid.save(options.out, palette.decode(tokens, size), columns, scale=options.scale),
    )  # fmt: skip
    return {"out": str(options.out), **report}

"""The pictures of a run as tokens: a palette is fitted where there is none, and a folder encoded once, into RUN/tokens.

Before a run directory has its config.json, nothing in it is taken for this run's: an interrupted start fits the same
palette again, and encoding goes on only under the same settings.
"""

import math
import sys
from pathlib import Path

import numpy as np

from igpt import data
from igpt.config import VITS
from igpt.convert import Checkpoint
from igpt.data.encode import encode_folder
from igpt.palette import Palette
from igpt.palette.kmeans import distinct_colours
from igpt.training.processes import Processes
from igpt.training.rundir import require_ours

COLOURS = 512  # the paper's
FITTED = 20_000  # pictures that a palette is fitted to, at most
SIDE = 32


def tokens_of(options, us: Processes, init: Checkpoint | None) -> tuple[data.Pictures, data.Pictures]:
    """The training and validation pictures, with tokens. Called by every process; the first does the work.

    The palette: --palette, that of `init`, the set's own, the run's, or one fitted to the training pictures."""
    run, size = options.run, options.size
    require_ours(run, options.data)
    kind, path = ("tokens", run / "tokens") if us.from_first(finished(run)) else data.kind_of(options.data)
    palette = init and init.palette
    if options.palette is not None:
        palette = Palette.load(options.palette)
    elif palette is None and (run / "config.json").is_file() and (run / "palette.npy").is_file():
        palette = Palette.load(run / "palette.npy")
    if init is not None and kind not in ("tokens", "openai"):
        if palette is None:
            raise ValueError(f"palette: {options.init} came without one, expected --palette")
        size = size or math.isqrt(init.config.n_ctx)
    if kind == "folder":
        if us.first:
            encode(path, size or SIDE, palette, options)
        us.wait_for_first()
        kind, path = "tokens", run / "tokens"
    spec = f"tokens:{path}" if kind == "tokens" else options.data
    train, valid = sets = [data.load(spec, split, size=size, holdout=options.holdout) for split in ("train", "valid")]
    require_some(options, *sets)
    if train.images is not None and palette is None and train.palette is None:
        if us.first:
            palette = fitted(options, train.images[spread(len(train))])
        us.wait_for_first()
        palette = us.from_first(palette)
    return train.encoded(palette), valid.encoded(palette).rows(slice(options.valid_pictures))


def pixels_of(options, init: Checkpoint | None) -> list[data.Pictures]:
    """The training and validation pictures as they are, in memory, with labels where these are what is learnt."""
    require_ours(options.run, options.data)
    size = options.size or (init.config if init else VITS[options.model]).size
    how = {"size": size, "holdout": options.holdout, "skip_bad": options.skip_bad, "workers": None}
    train, valid = sets = [data.load(options.data, split, **how) for split in ("train", "valid")]
    require_some(options, *sets)
    if train.images is None:
        raise ValueError(f"data: {train.name} has tokens only, expected pictures: a ViT reads pixels")
    if options.objective == "labels":
        data.same_classes(train, valid)
    return [train, valid.rows(slice(options.valid_pictures))]


def require_some(options, train: data.Pictures, valid: data.Pictures) -> None:
    """Raises ValueError if there is nothing to train on, or nothing to validate by."""
    if not len(train) or not len(valid):
        raise ValueError(
            f"holdout: got {options.holdout}, which leaves {len(train)} pictures of {options.data} to train on and "
            f"{len(valid)} for validation, expected some of both"
        )


def finished(run: Path) -> bool:
    """Whether a run has its tokens: whoever gets as far as config.json had encoded them, unless they were removed."""
    tokens = run / "tokens"
    return (run / "config.json").is_file() and tokens.is_dir() and not any(tokens.glob("**/progress.json"))


def encode(path: Path, size: int, palette: Palette | None, options) -> None:
    """A folder's token set, whole or as far as an interruption left it."""
    if palette is None:
        how = {"size": size, "holdout": options.holdout, "skip_bad": options.skip_bad, "workers": None}
        palette = fitted(options, data.load(f"folder:{path}", "train", **how, pick=spread).images)
    encode_folder(path, options.run / "tokens", palette, size, skip_bad=options.skip_bad)


def spread(n: int) -> np.ndarray:
    """At most FITTED of n rows, evenly apart."""
    return np.linspace(0, n - 1, min(n, FITTED)).astype(np.int64)


def fitted(options, images: np.ndarray) -> Palette:
    k = min(COLOURS, len(distinct_colours(images)[0]))
    print(f"{options.data} has no palette: {k} colours are fitted to {len(images)} of its training pictures, for "
          f"{options.run / 'palette.npy'}", file=sys.stderr)  # fmt: skip
    return Palette.fit(images, k)

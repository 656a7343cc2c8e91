"""The program `igpt encode`: a folder of pictures to a token set that every other program reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from igpt.data.encode import encode_folder
from igpt.palette import Palette


@dataclass(frozen=True)
class Options:
    """Encode pictures; the same command goes on after an interruption. Subfolders are labels; train/, valid/ and test/
    are splits."""

    source: Path  # the folder
    out: Path  # the token set: tokens.npy, labels.npy, palette.npy, meta.json
    palette: Path  # palette.npy, kmeans_centers.npy or a directory with one
    size: int = 32  # pictures become size x size
    crop: Literal["eval", "train", "stretch"] = "eval"  # ImageNet's evaluation or training crop, or the whole picture
    resample: str = "bilinear"  # Pillow's filter
    seed: int = 0  # of the training crops
    workers: int | None = None  # processes; default: one a core
    skip_bad: bool = False  # leave unreadable pictures out and count them; default: stop at the first


def run(options: Options) -> dict:
    metas = encode_folder(
        options.source, options.out, Palette.load(options.palette), options.size, crop=options.crop,
        resample=options.resample, seed=options.seed, workers=options.workers, skip_bad=options.skip_bad,
    )  # fmt: skip
    pictures = {part: meta["rows"] for part, meta in metas.items()}
    skipped = {part: len(meta["skipped"]) for part, meta in metas.items()}
    return {"out": str(options.out), "pictures": pictures, "skipped": skipped}

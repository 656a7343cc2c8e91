"""The program `igpt classify`: what is in your own pictures, as a fine-tuned model sees it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from igpt.data.folder import Files, list_pictures
from igpt.palette import Palette
from igpt.programs.source import Running


@dataclass(frozen=True)
class Options(Running):
    """The likeliest classes of pictures, a line each: file, class, probability."""

    model: str  # a fine-tuned one: our directory, or a Hugging Face directory or hub id
    pictures: tuple[Path, ...]  # files, or folders of them
    top: int = 1  # so many classes of each picture, the likeliest first
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the model's own
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 on a GPU, fp32 on a CPU
    batch: int | None = None  # pictures at once; default: 64 on a GPU, 4 on a CPU, whose caches hold no more
    seed: int = 0  # of a BERT model's mask
    skip_bad: bool = False  # leave unreadable pictures out and count them; default: stop at the first


def run(options: Options) -> dict:
    if not options.pictures:
        raise ValueError("pictures: got none, expected at least one file or folder")
    model = options.load_model().eval()
    config, palette = model.config, Palette.load(options.palette) if options.palette else model.palette
    if not config.classes:
        raise ValueError(f"model: {options.model} has no classifier, expected a fine-tuned one (igpt finetune)")
    if not 1 <= options.top <= config.classes:
        raise ValueError(f"top: got {options.top}, expected 1 to the model's {config.classes} classes")
    if palette is None:
        raise ValueError(f"palette: {options.model} came without one, expected --palette")
    names = [name for path in options.pictures for name in files(path)]
    every = Files(Path(), names, np.arange(len(names)))
    pictures = every.read(math.isqrt(config.n_ctx), skip_bad=options.skip_bad, workers=None)
    tokens = pictures.encoded(palette.require(config.vocab)).tokens
    probabilities, likeliest = options.probabilities(model, tokens).topk(options.top)
    called = model.class_names or tuple(map(str, range(config.classes)))
    read, found = [name for name in names if name not in set(pictures.skipped)], {}
    for name, row, shares in zip(read, likeliest.tolist(), probabilities.tolist()):
        found[name] = {called[i]: round(share, 4) for i, share in zip(row, shares)}
        print(f"{name}: {', '.join(f'{kind} {share:.4f}' for kind, share in found[name].items())}")
    return {"pictures": len(read), "skipped": len(pictures.skipped), "classes": found}


def files(path: Path) -> list[str]:
    return [str(path / name) for name in list_pictures(path).names] if path.is_dir() else [str(path)]

"""Picture sets under one roof.

    data = load("builtin:emoji", "train")
    data.images, data.labels, data.classes          # uint8 (N, 32, 32, 3), int64 (N,), names
    tokens = data.encoded().tokens                  # uint16 (N, 1024); encoded(palette) for sets without their own
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from igpt.data.crops import check_filter, resize_all
from igpt.data.folder import Files, folder
from igpt.data.formats import cifar10, cifar100, emoji, idx, stl10
from igpt.data.pictures import Pictures, joined
from igpt.data.token_sets import openai, tokens
from igpt.data.workers import check_counts

SPLITS = ("train", "valid", "train+valid", "test", "unlabeled")
# In the order in which a path is tried; a plain folder of pictures is what none of them knows.
FORMATS = {"tokens": tokens, "openai": openai, "cifar10": cifar10, "cifar100": cifar100, "stl10": stl10, "idx": idx}


def load(
    spec: str, split: str = "train", *, size: int | None = None, labels: str | None = None, holdout: float = 0.1,
    seed: int = 0, crop: str = "eval", resample: str = "bilinear", skip_bad: bool = False, workers: int | None = 0,
    pick: Callable | None = None,
) -> Pictures:
    """One split of a picture set.

    spec: "builtin:emoji"; or a path, recognised by what it holds: CIFAR-10 / CIFAR-100 / STL-10's files, IDX files
    (MNIST family), OpenAI's PREFIX_trX.npy, our token sets, else picture files; "KIND:path" settles the kind: tokens,
    openai, cifar10, cifar100, stl10, idx, folder.
    split: "train", "valid", "train+valid" (the held-out part folded back), "test", "unlabeled" (STL-10).
    Where the set has no validation split of its own, the part `holdout` of train is held out, picked by `seed`: 0.1 as
    in the paper for CIFAR and STL-10; for ImageNet the paper has 0.04.
    size: pictures become size x size (default 32); crop and resample say how (crops.py). Token sets keep theirs.
    labels: which, where a set has several (emoji "group" / "subgroup", CIFAR-100 "fine" / "coarse").
    skip_bad: leave unreadable picture files out (Pictures.skipped); by default they raise ValueError.
    workers: processes that read picture files (None: one a core), started by spawn, so a script needs its `__main__`
    guard; 0: threads of this one.
    pick: of n pictures, which to give, as ascending rows or a slice (e.g. `lambda n: slice(100)`); picture files that
    are held out or not picked are never read."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: got {holdout}, expected a part of the training pictures in [0, 1)")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size: got {size!r}, expected a positive integer")
    check_filter(resample)
    check_counts(seed=seed, workers=workers)
    parts = find_parts(spec, labels, partial(folder, crop=crop))
    if split in ("test", "unlabeled") or (split == "valid" and "valid" in parts):
        wanted = [split]
    else:
        wanted = ["train", "valid"] if split == "train+valid" and "valid" in parts else ["train"]
    if missing := [part for part in wanted if part not in parts]:
        raise ValueError(f"split: {spec} has no {missing[0]} pictures, only {sorted(parts)}")
    found = [parts[part]() for part in wanted]
    ends = np.cumsum([len(part) for part in found])
    index = np.arange(ends[-1])
    if wanted == ["train"] and split != "train+valid" and "valid" not in parts:
        index = hold_out(len(index), holdout, seed)[("train", "valid").index(split)]
    index = index if pick is None else index[pick(len(index))]
    if len(index) < ends[-1]:
        found = [part.rows(rows - end + len(part)) for part, rows, end in zip(found, split_at(index, ends), ends)]
    how = {"crop": crop, "resample": resample, "seed": seed, "skip_bad": skip_bad, "workers": workers}
    found = [part.read(size or 32, **how) if isinstance(part, Files) else part for part in found]
    pictures = joined(f"{spec}/{split}", found)
    if size is not None and pictures.images is None and pictures.size != (size, size):
        raise ValueError(f"size: got {size}, but {spec} holds tokens of pictures of {pictures.size}")
    if pictures.images is not None and pictures.size != (size or 32, size or 32):
        images = resize_all(pictures.images, size or 32, resample)
        pictures = replace(pictures, images=images, size=images.shape[1:3])
    return pictures


def kind_of(spec: str) -> tuple[str, Path]:
    """Which reader takes a spec, "emoji", one of FORMATS or "folder", and the path it reads. Raises ValueError."""
    if spec == "builtin:emoji":
        return "emoji", Path()
    kind, _, rest = spec.partition(":")
    if rest and kind in (*FORMATS, "folder"):
        return kind, Path(rest)
    if not spec:
        raise ValueError("spec: got '', expected a picture set; the current folder is '.'")
    path = Path(spec)
    for kind, reader in FORMATS.items():  # openai: folder/prefix too, as run.py's --data_path
        if (path.is_dir() or kind == "openai") and reader(path, None):
            return kind, path
    if path.is_dir():
        return "folder", path
    known = sorted((*FORMATS, "folder"))
    raise ValueError(f"spec: got {spec!r}, expected 'builtin:emoji', a folder, or one of {known}:path")


def find_parts(spec: str, labels: str | None, picture_folder) -> dict:
    """The splits of a spec, each as a function that reads it."""
    kind, path = kind_of(spec)
    if found := {"emoji": emoji, "folder": picture_folder, **FORMATS}[kind](path, labels):
        return found
    raise ValueError(f"spec: found no {kind} files at {path}")


def split_at(index: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Ascending rows of parts one after the other, which end at `ends`: those of each part."""
    return np.split(index, np.searchsorted(index, ends[:-1]))


def hold_out(n: int, part: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ascending rows (kept, held out) of n pictures, round(part * n) of them held out. The same for ever: RandomState's
    stream is frozen, unlike Generator's."""
    order = np.random.RandomState(seed).permutation(n)
    held = round(part * n)
    return np.sort(order[held:]), np.sort(order[:held])

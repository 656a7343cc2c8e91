"""Folders of picture files; subfolders are labels. Decoding is spread over threads (into memory) or processes."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from igpt.data.crops import CROPS, square
from igpt.data.formats import Parts, choose
from igpt.data.pictures import Pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


def split_folders(path: Path) -> dict[str, Path]:
    """{split: folder}: of train/, valid/ (or val/) and test/ where there is a train/, else the whole as train."""
    if not (path / "train").is_dir():
        return {"train": path}
    return {
        part: path / name for part, names in SPLIT_FOLDERS.items() for name in names if (path / name).is_dir()
    }


def list_pictures(root: Path) -> tuple[list[str], np.ndarray | None, tuple[str, ...]]:
    """Picture files below root in a fixed order, as paths relative to it; their labels (the first subfolder), or None
    where all lie in root itself; the classes. Hidden files and other suffixes are passed over.

    Raises ValueError if there are none, or if some lie in subfolders and some have no label."""
    names = []
    for folder, _, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        names += [
            name if inside == "." else f"{inside}{os.sep}{name}"
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    if not names:
        raise ValueError(f"{root}: no pictures here, expected files {SUFFIXES}")
    names.sort()
    tops = [name.partition(os.sep)[0] if os.sep in name else None for name in names]
    classes = tuple(sorted({top for top in tops if top is not None}))
    if not classes:
        return names, None, ()
    if None in tops:
        raise ValueError(
            f"{root}: label missing: {names[tops.index(None)]} lies beside the labelled subfolders {list(classes[:5])}"
        )
    index = {name: i for i, name in enumerate(classes)}
    return names, np.array([index[top] for top in tops], np.int64), classes


def check_classes(root: Path, classes: tuple[str, ...], train_root: Path) -> None:
    """Raises ValueError unless a split has the classes that train has."""
    expected = list_pictures(train_root)[2]
    if classes != expected:
        raise ValueError(
            f"classes differ: only in {train_root} {sorted(set(expected) - set(classes))}, only in {root} "
            f"{sorted(set(classes) - set(expected))}"
        )


def read_folder(root: Path, size: int, crop: str, resample: str, seed: int, skip_bad: bool) -> Pictures:
    """All pictures below root as size x size. Unreadable ones raise ValueError, or with skip_bad are left out."""
    names, labels, classes = list_pictures(root)

    def one(i: int) -> np.ndarray | None:
        try:
            return square(root / names[i], size, crop, (seed, i), resample)
        except ValueError as error:
            if skip_bad:
                return None
            raise ValueError(f"{error} (igpt encode --skip-bad leaves such pictures out)") from error

    with ThreadPoolExecutor() as threads:
        images = list(threads.map(one, range(len(names))))
    good = [i for i, image in enumerate(images) if image is not None]
    if not good:
        raise ValueError(f"{root}: none of its {len(names)} pictures can be read")
    return Pictures(
        name=str(root), size=(size, size), images=np.stack([images[i] for i in good]),
        labels=None if labels is None else labels[good], classes=classes,
        skipped=tuple(name for name, image in zip(names, images) if image is None),
    )


def folder(path: Path, labels: str | None, size: int, crop: str, resample: str, seed: int, skip_bad: bool) -> Parts:
    """A folder of pictures, all read into memory; for more than fit there, see encode_folder."""
    choose(labels, "class")
    if crop not in CROPS:
        raise ValueError(f"crop: got {crop!r}, expected one of {sorted(CROPS)}")
    roots = split_folders(path)

    def read(part: str) -> Pictures:
        pictures = read_folder(roots[part], size, crop, resample, seed, skip_bad)
        if part != "train":
            check_classes(roots[part], pictures.classes, roots["train"])
        return pictures

    return {part: partial(read, part) for part in roots}

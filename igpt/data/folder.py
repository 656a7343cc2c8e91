"""Folders of picture files; subfolders are labels. Nothing is left out without a word: what is passed over is counted,
and a warning says so with an example."""

import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from igpt.data.crops import CROPS
from igpt.data.formats import Parts, choose
from igpt.data.pictures import Pictures
from igpt.data.workers import available_cores, read_squares

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_FOLDERS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}


def split_folders(path: Path) -> dict[str, Path]:
    """{split: folder}: of train/, valid/ (or val/) and test/ where there is a train/, else the whole as train."""
    if not (path / "train").is_dir():
        return {"train": path}
    found = {part: [path / name for name in names if (path / name).is_dir()] for part, names in SPLIT_FOLDERS.items()}
    if len(found["valid"]) > 1:
        raise ValueError(f"{path}: got both valid/ and val/, expected one of them")
    return {part: folders[0] for part, folders in found.items() if folders}


@dataclass(frozen=True)
class Files:
    """Picture files of one folder, not read yet: those of `names`, relative to root, at the `places`.

    labels: int64 for each name, indices into classes; None, and `unlabelled` says why, where some have none."""

    root: Path
    names: list[str]
    places: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    unlabelled: str = ""

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, index) -> "Files":
        return replace(self, places=self.places[index])

    def read(
        self, size: int, crop: str = "eval", resample: str = "bilinear", seed: int = 0, skip_bad: bool = False,
        workers: int | None = 0,
    ) -> Pictures:  # fmt: skip
        """The files as size x size, by `workers` processes (None: one a core; 0: threads of this one). Unreadable ones
        raise ValueError naming the first, or with skip_bad are left out."""
        workers = available_cores() if workers is None else workers
        images, skipped = np.empty((len(self), size, size, 3), np.uint8), []
        batches = read_squares(
            self.root, self.names, self.places, workers, size=size, crop=crop, seed=seed, resample=resample
        )
        rows = 0
        with tqdm(total=len(self), unit="picture", desc=f"reading {self.root.name}", delay=1) as bar:
            for count, squares, bad in batches:
                if bad and not skip_bad:
                    raise ValueError(f"{bad[0][1]} (skip_bad leaves such pictures out)")
                images[rows : rows + len(squares)] = squares
                rows += len(squares)
                skipped += [name for name, _ in bad]
                bar.update(count)
        if not rows and len(self):
            raise ValueError(f"{self.root}: none of its {len(self)} pictures can be read")
        warn_of_bad(self.root, skipped, len(self))
        left_out = set(skipped)
        good = [place for place in self.places if self.names[place] not in left_out] if left_out else self.places
        return Pictures(
            name=str(self.root), size=(size, size), images=images[:rows], classes=self.classes,
            labels=None if self.labels is None else self.labels[good], skipped=tuple(skipped),
            unlabelled=self.unlabelled,
        )  # fmt: skip


def warn_of_bad(where: Path | str, skipped: list[str], count: int) -> None:
    if skipped:
        warnings.warn(f"{where}: left out {len(skipped)} unreadable of {count} pictures ({skipped[0]})", stacklevel=3)


def list_pictures(root: Path) -> Files:
    """Picture files below root in a fixed order, labelled by the first subfolder if all lie in one. Links are followed,
    but not around in circles. Hidden files and folders and other suffixes are passed over.

    Raises ValueError if there are none, OSError for a folder that cannot be read."""
    names, passed_over, suffixes = [], Counter(), Counter()
    above = {str(root): (os.path.realpath(root),)}  # of a folder to visit, itself and the folders it was reached by
    example = {}

    def pass_over(what: str, where: str) -> None:
        passed_over[what] += 1
        example.setdefault(what, os.path.relpath(where, root))

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_raise):
        way, inside = above.pop(folder), os.path.relpath(folder, root)
        for name in sorted(subfolders):
            path = os.path.join(folder, name)
            if name.startswith("."):
                pass_over("hidden folders", path)
            elif (real := os.path.realpath(path)) in way:
                pass_over("links back to a folder they lie in", path)
            else:
                above[path] = (*way, real)
        subfolders[:] = [name for name in sorted(subfolders) if os.path.join(folder, name) in above]
        for name in sorted(files):
            if name.startswith("."):
                pass_over("hidden files", os.path.join(folder, name))
            elif name.lower().endswith(SUFFIXES):
                names.append(name if inside == "." else f"{inside}{os.sep}{name}")
            else:
                pass_over("other files", os.path.join(folder, name))
                suffixes[os.path.splitext(name)[1]] += 1
    if not names:
        raise ValueError(f"{root}: no pictures here, expected files {SUFFIXES}")
    names.sort()
    tops = [name.partition(os.sep)[0] if os.sep in name else None for name in names]
    classes = tuple(sorted({top for top in tops if top is not None}))
    for entry in sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")):
        if entry not in classes:
            pass_over("folders without pictures", os.path.join(root, entry))
    if passed_over:
        said = ", ".join(f"{count} {what} ({example[what]})" for what, count in passed_over.items())
        kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(5))
        warnings.warn(f"{root}: passed over {said}" + f"; {kinds}" * bool(kinds), stacklevel=2)
    files = Files(root, names, np.arange(len(names)))
    if None in tops:
        beside = f"{names[tops.index(None)]} lies beside the labelled subfolders {list(classes[:5])}"
        return replace(files, unlabelled=beside if classes else "its pictures lie in no subfolders")
    index = {name: i for i, name in enumerate(classes)}
    return replace(files, labels=np.array([index[top] for top in tops], np.int64), classes=classes)


def _raise(error: OSError):
    raise error


def check_classes(split: Files, train: Files) -> None:
    """Raises ValueError if two labelled splits are not labelled by the same classes."""
    ours, theirs = set(train.classes), set(split.classes)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"classes differ: only in {train.root} {sorted(ours - theirs)}, only in {split.root} "
            f"{sorted(theirs - ours)}"
        )


def folder(path: Path, labels: str | None, crop: str) -> Parts:
    """A folder of pictures, to be read into memory; for more than fit there, see encode_folder."""
    choose(labels, "class")
    if crop not in CROPS:
        raise ValueError(f"crop: got {crop!r}, expected one of {sorted(CROPS)}")
    roots, listed = split_folders(path), cache(list_pictures)

    def split(part: str) -> Files:
        files = listed(roots[part])
        if part != "train":
            check_classes(files, listed(roots["train"]))
        return files

    return {part: partial(split, part) for part in roots}

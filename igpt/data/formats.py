"""Readers of picture sets: the built-in emoji, CIFAR, STL-10's binaries, IDX files (the MNIST family).

A reader is a function (path, labels) -> {split: function that gives that split as Pictures}, of the splits that it
finds at the path ("train", "valid", "test", "unlabeled"); empty where the path is no such set. Truncated or foreign
files raise a ValueError that names the file, what came and what was expected. Nothing in a pickle is run.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igpt.data import inert_pickle
from igpt.data.pictures import Pictures
from igpt.palette import Palette

Parts = dict[str, Callable[[], Pictures]]
ASSETS = Path(__file__).parents[1] / "assets"


def class_names(path: Path, count: int) -> tuple[str, ...]:
    """Class names, a line each, where the file exists; else "0", "1", ..."""
    if not path.is_file():
        return tuple(map(str, range(count)))
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if len(names) != count:
        raise ValueError(f"{path}: got {len(names)} class names, expected {count}")
    return names


def choose(labels: str | None, *kinds: str) -> str:
    """The kind of labels to give, by default the first. Raises ValueError for one that the set doesn't have."""
    if labels not in (None, *kinds):
        raise ValueError(f"labels: got {labels!r}, expected one of {kinds}")
    return labels or kinds[0]


def emoji(path: Path, labels: str | None) -> Parts:
    """builtin:emoji, 1,861 pictures of 32x32 with labels "group" (9, the default) or "subgroup" (99).

    Held out by emoji, with look-alikes on one side (assets/make_emoji.py): 1472 train, 197 valid, 192 test. A demo
    set: small enough to memorise, so judge on valid or test only."""

    def read(part: str) -> Pictures:
        kind = choose(labels, "group", "subgroup")
        with np.load(ASSETS / "emoji.npz", allow_pickle=False) as archive:
            chosen = archive["splits"][archive["split"]] == part
            return Pictures(
                name="builtin:emoji", size=(32, 32), images=archive["images"][chosen],
                labels=archive[kind][chosen].astype(np.int64), classes=tuple(archive[f"{kind}s"].tolist()),
                palette=Palette.load(ASSETS / "emoji_palette.npy"),
            )

    return {part: partial(read, part) for part in ("train", "valid", "test")}


class Labels(NamedTuple):
    """One kind of labels in CIFAR's files."""

    place: int  # in a binary record
    count: int  # classes
    names_file: str  # of the binary version
    key: str  # in a pickle
    names_key: str  # in the pickle of names


@dataclass(frozen=True)
class Cifar:
    """One of the two sets: folders of its versions, files, and kinds of labels, the default first."""

    binary: str
    python: str
    train: tuple[str, ...]
    test: str
    names: str
    kinds: dict[str, Labels]

    def parts(self, path: Path, labels: str | None) -> Parts:
        """Of the binary version or else the Python one, whose files have no suffix."""
        for folder, suffix, read in ((self.binary, ".bin", self.binary_file), (self.python, "", self.python_file)):
            root = path / folder if (path / folder).is_dir() else path
            files = {
                part: [root / f"{name}{suffix}" for name in names]
                for part, names in (("train", self.train), ("test", (self.test,)))
            }
            if found := {part: paths for part, paths in files.items() if any(file.is_file() for file in paths)}:
                return {part: partial(self.pictures, root, paths, read, labels) for part, paths in found.items()}
        return {}

    def pictures(self, root: Path, files: list[Path], read: Callable, labels: str | None) -> Pictures:
        kind = choose(labels, *self.kinds)
        if missing := [file for file in files if not file.is_file()]:
            raise ValueError(f"{missing[0]}: missing")
        planes, y = (np.concatenate(arrays) for arrays in zip(*(read(file, kind) for file in files)))
        return Pictures(
            name=str(root), size=(32, 32), labels=y.astype(np.int64), classes=self.classes(root, kind, read),
            images=np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)),
        )

    def binary_file(self, file: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Records of a byte for each kind of label, then 3 planes of 32x32."""
        data, length = np.fromfile(file, np.uint8), len(self.kinds) + 3 * 32 * 32
        if len(data) == 0 or len(data) % length:
            raise ValueError(f"{file}: truncated: got {len(data)} bytes, expected a multiple of {length}")
        data = data.reshape(-1, length)
        return data[:, len(self.kinds) :], data[:, self.kinds[kind].place]

    def python_file(self, file: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """A pickled dictionary, of which nothing is run."""
        values, key = inert_pickle.read(file), self.kinds[kind].key
        try:
            planes, y = inert_pickle.array(values["data"]), np.array(values[key])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{file}: not CIFAR's Python version: {error}") from error
        if planes.ndim != 2 or planes.shape[1] != 3 * 32 * 32 or y.shape != planes.shape[:1] or y.dtype.kind != "i":
            got = f"{planes.shape} and {y.dtype} {y.shape}"
            raise ValueError(f"{file}: got data and {key} of {got}, expected (N, 3072) and integers (N,)")
        return planes, y

    def classes(self, root: Path, kind: str, read: Callable) -> tuple[str, ...]:
        labels, pickled = self.kinds[kind], root / self.names
        if read == self.binary_file or not pickled.is_file():
            return class_names(root / labels.names_file, labels.count)
        names = inert_pickle.read(pickled).get(labels.names_key)
        if not isinstance(names, list) or len(names) != labels.count:
            raise ValueError(f"{pickled}: got {names!r:.80}, expected {labels.count} {labels.names_key}")
        return tuple(map(inert_pickle.text, names))


def cifar10(path: Path, labels: str | None) -> Parts:
    """CIFAR-10, binary or Python version."""
    kinds = {"class": Labels(0, 10, "batches.meta.txt", "labels", "label_names")}
    train = tuple(f"data_batch_{i}" for i in range(1, 6))
    files = Cifar("cifar-10-batches-bin", "cifar-10-batches-py", train, "test_batch", "batches.meta", kinds)
    return files.parts(path, labels)


def cifar100(path: Path, labels: str | None) -> Parts:
    """CIFAR-100, binary or Python version; labels "fine" (100, the default) or "coarse" (20)."""
    kinds = {
        kind: Labels(place, count, f"{kind}_label_names.txt", f"{kind}_labels", f"{kind}_label_names")
        for kind, place, count in (("fine", 1, 100), ("coarse", 0, 20))
    }
    return Cifar("cifar-100-binary", "cifar-100-python", ("train",), "test", "meta", kinds).parts(path, labels)


def stl10(path: Path, labels: str | None) -> Parts:
    """STL-10, binary: 96x96 pictures as planes in column-major order, labels 1 to 10, and 100,000 without labels."""
    root = path / "stl10_binary" if (path / "stl10_binary").is_dir() else path

    def read(part: str, labelled: bool) -> Pictures:
        choose(labels, "class")
        file, label_file, length = root / f"{part}_X.bin", root / f"{part}_y.bin", 3 * 96 * 96
        size = file.stat().st_size
        if size == 0 or size % length:
            raise ValueError(f"{file}: truncated: got {size} bytes, expected a multiple of {length}")
        if labelled and not label_file.is_file():
            raise ValueError(f"{label_file}: missing")
        return Pictures(
            name=str(root), size=(96, 96),
            images=np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1),
            labels=np.fromfile(label_file, np.uint8).astype(np.int64) - 1 if labelled else None,
            classes=class_names(root / "class_names.txt", 10) if labelled else (),
        )

    parts = (("train", True), ("test", True), ("unlabeled", False))
    return {part: partial(read, part, labelled) for part, labelled in parts if (root / f"{part}_X.bin").is_file()}


def read_idx(path: Path, rank: int) -> np.ndarray:
    """A uint8 IDX file of this rank, gzipped or plain."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or not gzip: {error}") from error
    header, magic = 4 + 4 * rank, bytes((0, 0, 8, rank))
    if data[:4] != magic or len(data) < header:
        raise ValueError(f"{path}: got a start of {data[:4]!r}, expected {magic!r} (IDX, uint8, rank {rank}) and sizes")
    shape = struct.unpack(f">{rank}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise ValueError(f"{path}: truncated: got {len(data) - header} bytes, expected {math.prod(shape)} for {shape}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def idx(path: Path, labels: str | None) -> Parts:
    """MNIST, Fashion-MNIST, EMNIST: PREFIXtrain-images-idx3-ubyte and the like, .gz or plain. Grey becomes RGB, padded
    with 0 to 32x32. Classes are the labels that occur (EMNIST's letters count from 1). EMNIST's pictures, which it
    stores column by column, come upright."""

    def find(stem: str, what: str) -> Path | None:
        pattern = f"*{stem}-{what}[-.]idx?-ubyte"
        found = sorted([*path.glob(pattern), *path.glob(f"{pattern}.gz")])
        if len({f.name.removesuffix(".gz") for f in found}) > 1:
            raise ValueError(f"{path}: got several IDX sets {[f.name for f in found]}, expected one a folder")
        return found[0] if found else None

    stems = {"train": "train", "test": "t10k" if find("t10k", "images") else "test"}

    def read(part: str) -> Pictures:
        choose(labels, "class")
        file = find(stems[part], "images")
        grey = read_idx(file, 3)
        if file.name.startswith("emnist"):
            grey = grey.swapaxes(1, 2)
        height, width = grey.shape[1:]
        if max(height, width) > 32:
            raise ValueError(f"{path}: got pictures of {height}x{width}, expected at most 32x32")
        top, left = (32 - height) // 2, (32 - width) // 2
        padded = np.pad(grey, ((0, 0), (top, 32 - height - top), (left, 32 - width - left)))
        y = {p: read_idx(f, 1) for p, stem in stems.items() if (f := find(stem, "labels"))}
        values = np.unique(y.get("train", y.get(part, np.empty(0))))
        if part in y and (extra := sorted(set(y[part].tolist()) - set(values.tolist()))):
            raise ValueError(f"{path}: classes differ: {extra} are in {part} and not in train")
        return Pictures(
            name=str(path), size=(32, 32), images=np.repeat(padded[..., None], 3, axis=-1),
            labels=np.searchsorted(values, y[part]) if part in y else None, classes=tuple(map(str, values)),
        )

    return {part: partial(read, part) for part, stem in stems.items() if path.is_dir() and find(stem, "images")}

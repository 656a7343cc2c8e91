"""Readers of picture sets: the built-in emoji, CIFAR and STL-10 binaries, IDX files (the MNIST family).

A reader is a function (path, labels) -> {split: function that gives that split as Pictures}, of the splits that it
finds at the path ("train", "valid", "test", "unlabeled"); empty where the path is no such set. Truncated or foreign
files raise a ValueError that names the file, what came and what was expected. Nothing is unpickled.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

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


def cifar(path: Path, folder: str, train: tuple[str, ...], test: str, columns: dict, labels: str | None) -> Parts:
    """CIFAR's binary version: records of a byte for each of `columns` (kind of label -> its place, classes, file of
    their names; the default first), then 3 planes of 32x32."""
    root = path / folder if (path / folder).is_dir() else path
    length = len(columns) + 3 * 32 * 32

    def records(file: Path) -> np.ndarray:
        if not file.is_file():
            raise ValueError(f"{file}: missing")
        data = np.fromfile(file, np.uint8)
        if len(data) == 0 or len(data) % length:
            raise ValueError(f"{file}: truncated: got {len(data)} bytes, expected a multiple of {length}")
        return data.reshape(-1, length)

    def read(names: tuple[str, ...]) -> Pictures:
        data = np.concatenate([records(root / name) for name in names])
        planes = data[:, len(columns) :].reshape(-1, 3, 32, 32)
        place, count, names_file = columns[choose(labels, *columns)]
        return Pictures(
            name=str(root), size=(32, 32), images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
            labels=data[:, place].astype(np.int64), classes=class_names(root / names_file, count),
        )

    files = {"train": train, "test": (test,)}
    return {part: partial(read, names) for part, names in files.items() if any((root / n).is_file() for n in names)}


def cifar10(path: Path, labels: str | None) -> Parts:
    """CIFAR-10, binary version: data_batch_1.bin to data_batch_5.bin, test_batch.bin."""
    columns = {"class": (0, 10, "batches.meta.txt")}
    train = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    return cifar(path, "cifar-10-batches-bin", train, "test_batch.bin", columns, labels)


def cifar100(path: Path, labels: str | None) -> Parts:
    """CIFAR-100, binary version: train.bin, test.bin; labels "fine" (100, the default) or "coarse" (20)."""
    columns = {"fine": (1, 100, "fine_label_names.txt"), "coarse": (0, 20, "coarse_label_names.txt")}
    return cifar(path, "cifar-100-binary", ("train.bin",), "test.bin", columns, labels)


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
    with 0 to 32x32."""

    def find(stem: str, what: str) -> Path | None:
        pattern = f"*{stem}-{what}[-.]idx?-ubyte"
        found = sorted([*path.glob(pattern), *path.glob(f"{pattern}.gz")])
        if len({f.name.removesuffix(".gz") for f in found}) > 1:
            raise ValueError(f"{path}: got several IDX sets {[f.name for f in found]}, expected one a folder")
        return found[0] if found else None

    stems = {"train": "train", "test": "t10k" if find("t10k", "images") else "test"}

    def read(part: str) -> Pictures:
        choose(labels, "class")
        grey = read_idx(find(stems[part], "images"), 3)
        height, width = grey.shape[1:]
        if max(height, width) > 32:
            raise ValueError(f"{path}: got pictures of {height}x{width}, expected at most 32x32")
        top, left = (32 - height) // 2, (32 - width) // 2
        padded = np.pad(grey, ((0, 0), (top, 32 - height - top), (left, 32 - width - left)))
        y = {p: read_idx(f, 1).astype(np.int64) for p, stem in stems.items() if (f := find(stem, "labels"))}
        if "train" in y and part in y and (extra := sorted(set(y[part].tolist()) - set(y["train"].tolist()))):
            raise ValueError(f"{path}: classes differ: {extra} are in {part} and not in train")
        return Pictures(
            name=str(path), size=(32, 32), images=np.repeat(padded[..., None], 3, axis=-1), labels=y.get(part),
            classes=tuple(map(str, range(1 + max((int(v.max()) for v in y.values() if len(v)), default=-1)))),
        )

    return {part: partial(read, part) for part, stem in stems.items() if path.is_dir() and find(stem, "images")}

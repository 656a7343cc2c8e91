"""Sets of palette ids: ours (tokens.npy, labels.npy, palette.npy, meta.json) and OpenAI's npy files."""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np

from igpt.data.formats import Parts, choose
from igpt.data.pictures import Pictures
from igpt.palette import Palette, load_npy

OPENAI_VOCAB = 512
META = ("rows", "height", "width", "vocab", "classes", "labels")
CHECKED = 1 << 14  # pictures whose tokens are checked at once


def check_tokens(path: Path, tokens: np.ndarray, vocab: int) -> None:
    """Raises ValueError naming the file and the first picture with a token that the palette doesn't have."""
    for start in range(0, len(tokens), CHECKED):
        chunk = tokens[start : start + CHECKED]
        if chunk.size and (chunk.min() < 0 or chunk.max() >= vocab):
            row = int(((chunk < 0) | (chunk >= vocab)).any(1).argmax())
            span = f"{chunk[row].min()} to {chunk[row].max()}"
            raise ValueError(f"{path}: picture {start + row} has tokens from {span}, expected 0 to {vocab - 1}")


def one_hot_labels(path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels int64 (N,) and class names of a one-hot .npy (N, classes)."""
    one_hot = load_npy(path)
    if one_hot.ndim != 2:
        raise ValueError(f"{path}: got shape {one_hot.shape}, expected (N, classes)")
    labels = np.empty(len(one_hot), np.int64)
    for start in range(0, len(one_hot), CHECKED):
        rows = np.asarray(one_hot[start : start + CHECKED])
        good = ((rows == 0) | (rows == 1)).all(1) & (rows.sum(1) == 1)
        if not good.all():
            raise ValueError(f"{path}: row {start + int(good.argmin())} is not one-hot: expected zeros and a single 1")
        labels[start : start + CHECKED] = rows.argmax(1)
    return labels, tuple(map(str, range(one_hot.shape[1])))


def write_json(path: Path, value: dict) -> None:
    """Atomically: the file is there whole, or as it was."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_room(folder: Path, palette: Palette) -> None:
    """Raises ValueError if a token set of this palette would overwrite files in the folder."""
    there = [name for name in ("tokens.npy", "labels.npy", "meta.json") if (folder / name).exists()]
    if (folder / "palette.npy").exists() and Palette.load(folder / "palette.npy") != palette:
        there.append("palette.npy")
    if there:
        raise ValueError(f"out: {folder} holds {there} already, which are not this set's; expected a new folder")


def finish(folder: Path, size: tuple[int, int], rows: int, labels, classes, palette: Palette, notes: dict) -> dict:
    """Writes all of a token set but tokens.npy itself, meta.json last: a folder without it is not taken as a set."""
    if labels is not None:
        np.save(folder / "labels.npy", np.asarray(labels, np.int64), allow_pickle=False)
    palette.save(folder / "palette.npy")
    meta = {"rows": rows, "height": size[0], "width": size[1], "vocab": len(palette), "classes": list(classes),
            "labels": labels is not None, "palette": palette.fingerprint, **notes}
    write_json(folder / "meta.json", meta)
    return meta


def save_tokens(pictures: Pictures, folder, palette: Palette | None = None) -> dict:
    """Writes pictures as a token set that `load` reads (with their labels), and returns its meta.json.

    Raises ValueError if the folder holds tokens already."""
    pictures = pictures.encoded(palette)
    if pictures.palette is None:
        raise ValueError(f"palette: {pictures.name} has none of its own; expected the one that made its tokens")
    folder = Path(folder)
    check_room(folder, pictures.palette)
    check_tokens(Path(pictures.name), pictures.tokens, pictures.vocab)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.asarray(pictures.tokens).astype(np.uint16, copy=False), allow_pickle=False)
    return finish(folder, pictures.size, len(pictures), pictures.labels, pictures.classes, pictures.palette,
                  {"source": pictures.name})


def read_meta(folder: Path) -> dict:
    """meta.json of a finished token set of ours."""
    path = folder / "meta.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no meta.json: it was not finished; encode it again to go on")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        return {"unlabelled": meta.get("unlabelled", ""), **{key: meta[key] for key in META}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a token set's: {error!r}, expected JSON with {META}") from error


def read_tokens(folder: Path, train: Path) -> Pictures:
    """A token set of ours, whose classes must be those of `train` if both are labelled. The tokens stay on disk; their
    range is checked once, here."""
    meta, path = read_meta(folder), folder / "tokens.npy"
    there = meta["classes"] if folder == train else read_meta(train)["classes"]
    if meta["classes"] and there and meta["classes"] != there:
        raise ValueError(f"classes differ: {train} has {there}, {folder} has {meta['classes']}; expected the same")
    shape, size = (meta["rows"], meta["height"] * meta["width"]), (meta["height"], meta["width"])
    ids = load_npy(path)
    if ids.dtype != np.uint16 or ids.shape != shape:
        raise ValueError(f"{path}: got {ids.dtype} {ids.shape}, expected uint16 {shape}")
    check_tokens(path, ids, meta["vocab"])
    palette = None
    if (folder / "palette.npy").is_file():
        palette = Palette.load(folder / "palette.npy").require(meta["vocab"])
    labels = None
    if meta["labels"]:
        labels = load_npy(folder / "labels.npy")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"{folder / 'labels.npy'}: got {labels.dtype} {labels.shape}, expected integers (N,)")
        labels = np.array(labels, np.int64)
    return Pictures(name=str(folder), size=size, tokens=ids, labels=labels, classes=tuple(meta["classes"]),
                    palette=palette, vocab=meta["vocab"], unlabelled=meta["unlabelled"])


def tokens(path: Path, labels: str | None) -> Parts:
    """Our sets: a folder with tokens.npy, or with train/, valid/, test/ folders of that kind."""

    def begun(folder: Path) -> bool:
        return (folder / "tokens.npy").is_file() or (folder / "progress.json").is_file()

    folders = {part: path / part for part in ("train", "valid", "test") if begun(path / part)}
    if not folders and begun(path):
        folders = {"train": path}

    def read(part: str) -> Pictures:
        choose(labels, "class")
        return read_tokens(folders[part], folders.get("train", folders[part]))

    return {part: partial(read, part) for part in folders}


def openai(path: Path, labels: str | None) -> Parts:
    """OpenAI's: PREFIX_{trX,vaX,teX}.npy, palette ids (N, n_ctx), and one-hot PREFIX_{trY,vaY,teY}.npy.

    The path is a folder that holds one prefix, or folder/prefix. A kmeans_centers.npy beside them is the palette."""
    prefix = path
    if path.is_dir():
        prefixes = sorted(f.name.removesuffix("_trX.npy") for f in path.glob("*_trX.npy"))
        if len(prefixes) > 1:
            raise ValueError(f"{path}: got sets {prefixes}, expected one; name it: openai:{path / prefixes[0]}")
        if not prefixes:
            return {}
        prefix = path / prefixes[0]

    def file(part: str, what: str) -> Path:  # "train" is tr, "valid" va, "test" te
        return prefix.with_name(f"{prefix.name}_{part[:2]}{what}.npy")

    def read(part: str) -> Pictures:
        choose(labels, "class")
        ids, centres = load_npy(file(part, "X")), prefix.with_name("kmeans_centers.npy")
        palette = Palette.load(centres) if centres.is_file() else None
        vocab = OPENAI_VOCAB if palette is None else len(palette)
        side = math.isqrt(ids.shape[-1]) if ids.ndim == 2 else 0
        if side == 0 or side**2 != ids.shape[1] or ids.dtype.kind not in "iu":
            raise ValueError(f"{file(part, 'X')}: got {ids.dtype} {ids.shape}, expected integers (N, a square number)")
        check_tokens(file(part, "X"), ids, vocab)
        y, classes = one_hot_labels(file(part, "Y")) if file(part, "Y").is_file() else (None, ())
        # uint16 files stay memory-mapped, wider ones are narrowed once.
        return Pictures(name=str(file(part, "X")), size=(side, side), tokens=ids.astype(np.uint16, copy=False),
                        labels=y, classes=classes, palette=palette, vocab=vocab)

    return {part: partial(read, part) for part in ("train", "valid", "test") if file(part, "X").is_file()}

"""Picture sets: every format read right from small files written by the format's own rules, bad files named."""

import contextlib
import gzip
import io
import multiprocessing
import pickle
import signal
import struct
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import igpt.data.workers
from igpt import Palette, data
from igpt.data.crops import eval_crop, open_picture, square, train_crop

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(1).uniform(-1, 1, (64, 3)))


# --- the built-in set


def test_emoji_splits_are_fixed_and_apart():
    parts = {split: data.load("builtin:emoji", split) for split in ("train", "valid", "test", "train+valid")}
    assert [len(part) for part in parts.values()] == [1472, 197, 192, 1669]
    seen = [{picture.tobytes() for picture in parts[split].images} for split in ("train", "valid", "test")]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    train = parts["train"]
    assert train.images.shape == (1472, 32, 32, 3) and train.images.dtype == np.uint8 and train.size == (32, 32)
    assert len(train.classes) == 9 and train.labels.dtype == np.int64 and set(train.labels) == set(range(9))
    assert train.n_ctx == 1024 and len(train.palette) == 512
    data.same_classes(train, parts["test"])


def test_emoji_subgroups_tokens_and_size():
    train = data.load("builtin:emoji", "train", labels="subgroup")
    assert len(train.classes) == 99 and set(train.labels) == set(range(99))
    encoded = train.encoded()
    assert encoded.tokens.dtype == np.uint16 and encoded.tokens.shape == (1472, 1024) and encoded.vocab == 512
    assert np.array_equal(encoded.tokens, train.palette.encode(train.images).numpy())
    assert data.load("builtin:emoji", "test", size=16).images.shape == (192, 16, 16, 3)


# --- formats


def write_cifar10(root: Path, per_file: int = 3) -> tuple[np.ndarray, np.ndarray]:
    planes, labels = noise(6 * per_file, 3, 32, 32), np.arange(6 * per_file, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], planes.reshape(len(planes), -1)], axis=1)
    root.mkdir(parents=True, exist_ok=True)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, 6)):
        part.tofile(root / name)
    return planes.transpose(0, 2, 3, 1), labels


def test_cifar10(tmp_path):
    images, labels = write_cifar10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "batches.meta.txt").write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
    for spec in (tmp_path, tmp_path / "cifar-10-batches-bin", f"cifar10:{tmp_path}"):
        whole, test = (data.load(str(spec), split) for split in ("train+valid", "test"))
        assert np.array_equal(whole.images, images[:15]) and np.array_equal(whole.labels, labels[:15])
        assert np.array_equal(test.images, images[15:]) and np.array_equal(test.labels, labels[15:])
        assert test.classes[3] == "name3"


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('run!')",)


class Python2(pickle._Pickler):
    """As CIFAR's authors pickled it: protocol 2, whose strings are bytes."""

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<I", len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def python2(value) -> bytes:
    Python2(file := io.BytesIO(), protocol=2).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("dumps", [pickle.dumps, python2, partial(pickle.dumps, protocol=2)])
def test_cifar_python_version(tmp_path, dumps):
    images, labels = write_cifar10(tmp_path / "cifar-10-batches-bin")
    there = tmp_path / "python" / "cifar-10-batches-py"
    there.mkdir(parents=True)
    planes = np.split(images.transpose(0, 3, 1, 2).reshape(18, -1), 6)
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {b"data": planes[i], b"labels": labels[3 * i :][:3].tolist(), b"batch_label": b"some"}
        (there / name).write_bytes(dumps(batch))
    for spec in (there, there.parent, f"cifar10:{there}"):
        for split in ("train+valid", "test"):
            want, got = data.load(str(tmp_path), split), data.load(str(spec), split)
            assert np.array_equal(want.images, got.images) and np.array_equal(want.labels, got.labels)
            assert got.classes == want.classes
    (there / "batches.meta").write_bytes(dumps({b"label_names": [b"name%d" % i for i in range(10)]}))
    assert data.load(str(there), "test").classes[3] == "name3"
    for bad, words in (
        ({b"data": Evil(), b"labels": [0]}, "got a Kept, expected an array of uint8"),
        ({b"data": planes[0].astype(np.int8), b"labels": [0]}, "got an array of 'i1', expected uint8"),
        ({b"data": planes[0], b"labels": [0]}, r"got data and labels of \(3, 3072\) and int64 \(1,\)"),
        ({b"labels": [0]}, "not CIFAR's Python version: 'data'"), ([1], "got a pickled list, expected a dictionary"),
        (Evil(), "got a pickled Kept"), ({object(): 1}, "not CIFAR's Python version: 'data'"),
    ):  # fmt: skip
        (there / "test_batch").write_bytes(pickle.dumps(bad))
        with pytest.raises(ValueError, match=rf"test_batch: .*{words}"):
            data.load(str(there), "test")


def test_a_mangled_pickle_raises_only_value_error(tmp_path):
    whole = pickle.dumps({b"data": noise(2, 3072), b"labels": [0, 1], "more": Evil()}, protocol=2)
    head, rng = np.frombuffer(whole, np.uint8), np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(2, 6))]:
        (tmp_path / name).write_bytes(whole)
    for _ in range(300):
        mangled = head[: rng.integers(1, len(head) + 1)].copy()
        where = rng.integers(0, min(len(mangled), 400), 4)
        mangled[where] = rng.integers(0, 256, 4)
        (tmp_path / "data_batch_1").write_bytes(mangled.tobytes())
        try:
            assert data.load(str(tmp_path)).images.shape[1:] == (32, 32, 3)
        except ValueError as error:
            assert "data_batch_1" in str(error) or "labels from" in str(error)


def test_hold_out(tmp_path):
    images, _ = write_cifar10(tmp_path, per_file=8)
    train, valid = (data.load(str(tmp_path), split) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (36, 4)
    together = {picture.tobytes() for part in (train, valid) for picture in part.images}
    assert together == {picture.tobytes() for picture in images[:40]}
    assert [len(data.load(str(tmp_path), s, holdout=0.04, seed=1)) for s in ("train", "valid")] == [38, 2]
    assert len(data.load(str(tmp_path), "train", holdout=0)) == 40
    # The same for ever: what one version held out, every version holds out.
    assert data.hold_out(20, 0.2, seed=0)[1].tolist() == [1, 8, 18, 19]


def test_cifar100(tmp_path):
    planes, coarse, fine = noise(4, 3, 32, 32), np.array([0, 19, 5, 7], np.uint8), np.array([99, 0, 50, 1], np.uint8)
    records = np.concatenate([coarse[:, None], fine[:, None], planes.reshape(4, -1)], axis=1)
    records.tofile(tmp_path / "train.bin")
    records[:2].tofile(tmp_path / "test.bin")
    train = data.load(str(tmp_path), "train+valid")
    assert np.array_equal(train.labels, fine) and len(train.classes) == 100
    assert np.array_equal(train.images, planes.transpose(0, 2, 3, 1))
    train = data.load(str(tmp_path), "test", labels="coarse")
    assert np.array_equal(train.labels, coarse[:2]) and len(train.classes) == 20
    there = tmp_path / "cifar-100-python"
    there.mkdir()
    names = {"fine_label_names": [str(i) for i in range(100)], "coarse_label_names": list("abcdefghijklmnopqrst")}
    whole = {"data": planes.reshape(4, -1), "fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
    for name, values in (("train", whole), ("test", whole), ("meta", names)):
        (there / name).write_bytes(pickle.dumps(values))
    python = data.load(str(there), "test", labels="coarse")
    assert np.array_equal(python.images, planes.transpose(0, 2, 3, 1)) and python.labels.tolist() == [0, 19, 5, 7]
    assert python.classes[19] == "t"


def test_stl10(tmp_path):
    images = noise(20, 96, 96, 3)
    images[0] = np.arange(96, dtype=np.uint8)[:, None, None]  # rows brighten downwards: catches a transposition
    for part, count in (("train", 20), ("test", 4), ("unlabeled", 6)):
        images[:count].transpose(0, 3, 2, 1).tofile(tmp_path / f"{part}_X.bin")
        if part != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(tmp_path / f"{part}_y.bin")
    test = data.load(str(tmp_path), "test", size=96)
    assert np.array_equal(test.images, images[:4]) and test.labels.tolist() == [0, 1, 2, 3]
    train, valid = data.load(str(tmp_path), "train"), data.load(str(tmp_path), "valid")
    assert train.images.shape == (18, 32, 32, 3) and len(valid) == 2 and train.size == (32, 32)
    first = data.load(str(tmp_path), "train+valid", resample="box").images[0]
    assert np.array_equal(first[:, 0, 0], images[0, :, 0, 0].reshape(32, 3).mean(1))
    unlabeled = data.load(str(tmp_path), "unlabeled")
    assert len(unlabeled) == 6
    with pytest.raises(ValueError, match="labels are missing"):
        unlabeled.labelled()


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, zipped: bool, prefix: str = "", test: str = "t10k", dot: str = "-", first: int = 0):
    root.mkdir(parents=True, exist_ok=True)
    grey, labels = noise(12, 28, 28), np.arange(12, dtype=np.uint8) % 4 + first
    stored = grey.swapaxes(1, 2) if prefix else grey  # EMNIST's readme: column by column
    for stem, rows in (("train", slice(0, 8)), (test, slice(8, 12))):
        for what, array in (("images", stored), ("labels", labels)):
            name = f"{prefix}{stem}-{what}{dot}idx{array.ndim}-ubyte"
            content = idx_bytes(array[rows])
            (root / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(content) if zipped else content)
    return grey, labels


@pytest.mark.parametrize("zipped, prefix, test, dot, first", [
    (True, "", "t10k", "-", 0), (False, "", "t10k", ".", 0), (True, "emnist-letters-", "test", "-", 1),
])
def test_idx(tmp_path, zipped, prefix, test, dot, first):
    grey, labels = write_idx(tmp_path, zipped, prefix, test, dot, first)
    train, held_out = data.load(str(tmp_path), "train+valid"), data.load(str(tmp_path), "test")
    assert train.images.shape == (8, 32, 32, 3) and held_out.images.shape == (4, 32, 32, 3)
    assert np.array_equal(train.images[:, 2:30, 2:30], np.repeat(grey[:8, :, :, None], 3, axis=-1))
    border = train.images.copy()
    border[:, 2:30, 2:30] = 0
    assert not border.any(), "padded with black"
    assert np.array_equal(train.labels, labels[:8] - first) and np.array_equal(held_out.labels, labels[8:] - first)
    assert train.classes == tuple(str(first + i) for i in range(4)), "no class is empty"
    data.same_classes(train, held_out)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_openai(tmp_path, dtype):
    ids = {part: RNG.integers(0, 512, (n, 1024)).astype(dtype) for part, n in (("tr", 6), ("va", 3), ("te", 2))}
    for part, tokens in ids.items():
        np.save(tmp_path / f"cifar10_{part}X.npy", tokens)
        np.save(tmp_path / f"cifar10_{part}Y.npy", np.eye(10, dtype=np.float32)[np.arange(len(tokens))])
    for split, part in (("train", "tr"), ("valid", "va"), ("test", "te")):
        pictures = data.load(str(tmp_path), split)
        assert np.array_equal(pictures.tokens, ids[part]) and pictures.tokens.dtype == np.uint16
        assert pictures.labels.tolist() == list(range(len(ids[part]))) and len(pictures.classes) == 10
        assert pictures.size == (32, 32) and pictures.vocab == 512
    for spec in (f"openai:{tmp_path}/cifar10", f"{tmp_path}/cifar10"):  # the latter as run.py's --data_path
        assert len(data.load(spec, "train+valid")) == 9
    np.save(tmp_path / "imagenet_trX.npy", ids["tr"])
    with pytest.raises(ValueError, match=r"got sets \['cifar10', 'imagenet'\], expected one; name it: openai:"):
        data.load(str(tmp_path))
    unlabelled = data.load(f"openai:{tmp_path}/imagenet", "train")
    assert unlabelled.labels is None and len(unlabelled) == 5, "no va file: a tenth is held out"


def test_tokens_stay_on_disk(tmp_path, palette):
    train = data.load("builtin:emoji", "train").rows(slice(0, 50))
    data.save_tokens(train, tmp_path, palette)
    whole = data.load(str(tmp_path), "train+valid")
    assert isinstance(whole.tokens, np.memmap) and whole.palette == palette and whole.vocab == 64
    assert np.array_equal(whole.tokens, train.encoded(palette).tokens) and np.array_equal(whole.labels, train.labels)
    assert whole.classes == train.classes and whole.images is None
    kept, held = data.load(str(tmp_path), "train"), data.load(str(tmp_path), "valid")
    assert isinstance(kept.tokens, data.Rows) and (len(kept), len(held)) == (45, 5)
    rows = data.hold_out(50, 0.1)[0]
    assert np.array_equal(kept.tokens[3:7], whole.tokens[rows[3:7]]) and kept.tokens.shape == (45, 1024)
    assert np.array_equal(kept.rows(kept.labels == 0).tokens, whole.tokens[rows][kept.labels == 0])
    assert np.array_equal(kept.tokens[np.array([4, 1])], whole.tokens[rows[[4, 1]]])


def test_tokens_are_judged_before_they_are_narrowed(tmp_path, palette):
    ids = np.full((2, 4), 3, np.int64)
    wide = data.Pictures(name="wide", size=(2, 2), tokens=ids, palette=palette, vocab=64)
    data.save_tokens(wide, tmp_path / "a")
    assert np.array_equal(data.load(str(tmp_path / "a"), "train+valid").tokens, ids)
    for bad in (64, -1, 2**16, 2**32 + 3):
        ids[1, 2] = bad
        with pytest.raises(ValueError, match=r"picture 1 has tokens from .*, expected 0 to 63"):
            data.save_tokens(wide, tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --- folders


def write_folder(root: Path, classes=("cat", "dog"), n: int = 3, size=(40, 30)) -> dict[str, np.ndarray]:
    written = {}
    for i in range(n * len(classes)):
        path = root / classes[i % len(classes)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        written[str(path.relative_to(root))] = noise(size[1], size[0], 3)
        Image.fromarray(written[str(path.relative_to(root))]).save(path)
    return written


def test_folder(tmp_path):
    write_folder(tmp_path / "plain", size=(32, 32))
    exact = write_folder(tmp_path, size=(32, 32))
    (tmp_path / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / "cat" / ".hidden.png").write_text("not a picture")
    pictures = data.load(str(tmp_path), "train", holdout=0)
    assert pictures.classes == ("cat", "dog", "plain") and pictures.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 6
    assert np.array_equal(pictures.images[:3], np.stack([exact[k] for k in sorted(exact) if k.startswith("cat")]))
    assert data.load(str(tmp_path / "plain" / "cat"), "train", holdout=0).labels is None
    assert data.load(str(tmp_path), "train", holdout=0, size=16).images.shape == (12, 16, 16, 3)


def test_folder_with_splits(tmp_path):
    for name, n in (("train", 4), ("val", 2), ("test", 1)):
        write_folder(tmp_path / name, n=n)
    assert [len(data.load(str(tmp_path), s)) for s in ("train", "valid", "test", "train+valid")] == [8, 4, 2, 12]
    write_folder(tmp_path / "test", classes=("dog", "fox"), n=1)
    with pytest.raises(ValueError, match=r"classes differ: only in .*train \[\], only in .*test \['fox'\]"):
        data.load(str(tmp_path), "test")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    picture = Image.fromarray(noise(32, 32, 3)).convert(mode)
    if mode.endswith("A"):
        picture.putalpha(0)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = square(next(tmp_path.iterdir()), 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    if mode.endswith("A"):
        assert (pixels == 255).all(), "transparent is white"


SIXTEEN = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
GREYS = np.rint(SIXTEEN[..., None].repeat(3, -1) / 257)  # the same in 8 bits


def write_wide(path: Path, what: str) -> None:
    """The ramp in one of the ways in which files hold more than 8 bits."""
    match what:
        case "big-endian":
            Image.frombytes("I;16B", (32, 32), SIXTEEN.astype(">u2").tobytes()).save(path)
        case "float":
            Image.fromarray(SIXTEEN.astype(np.float32) / 65535).save(path)
        case "white is zero":
            Image.fromarray(65535 - SIXTEEN).save(path, tiffinfo={262: 0})
        case "one value is transparent":
            Image.fromarray(SIXTEEN).save(path, transparency=0)
        case "pgm":
            path.write_bytes(b"P5 32 32 65535 " + SIXTEEN.astype(">u2").tobytes())
        case "12 bits":
            bits = np.unpackbits((SIXTEEN >> 4).astype(">u2")[..., None].view(np.uint8), axis=-1)[..., 4:]
            Image.fromarray(SIXTEEN).save(path)  # whose only strip is then packed: BitsPerSample 12, 48 bytes a row
            file = bytearray(path.read_bytes())
            with Image.open(path) as written:
                (start,), entries = written.tag_v2[273], struct.unpack_from("<I", file, 4)[0]
            for at in range(entries + 2, entries + 2 + 12 * struct.unpack_from("<H", file, entries)[0], 12):
                if file[at : at + 2] == struct.pack("<H", 258):
                    file[at + 8] = 12
            packed = np.packbits(bits.reshape(32, -1), axis=-1).tobytes()
            file[start : start + len(packed)] = packed
            path.write_bytes(file)
        case _:
            Image.fromarray(SIXTEEN).save(path)


@pytest.mark.parametrize(
    "name, what",
    [
        ("a.png", "plain"), ("a.tif", "plain"), ("a.tif", "big-endian"), ("a.tif", "float"), ("a.tif", "12 bits"),
        ("a.tif", "white is zero"), ("a.png", "one value is transparent"), ("a.pgm", "pgm"),
    ],
)  # fmt: skip
def test_more_than_8_bits_keep_their_greys(tmp_path, name, what):
    write_wide(tmp_path / name, what)
    want = GREYS.copy()
    if what == "one value is transparent":
        want[:, 0] = 255
    assert np.abs(square(tmp_path / name, 32) - want).max() <= (what == "12 bits")


@pytest.mark.parametrize(
    "values, words",
    [
        (SIXTEEN.astype(np.int32), "32-bit or signed integers"),
        (SIXTEEN.astype(np.float32), "floats from 0.0 to 65535"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan"),
    ],
)  # fmt: skip
def test_numbers_without_a_known_white_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: .*{words}"):
        open_picture(tmp_path / "a.tif")


def test_upright_by_exif(tmp_path):
    picture = Image.fromarray(noise(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    assert open_picture(tmp_path / "a.png").size == (20, 30)


# --- crops


def test_eval_crop_is_the_centre():
    marked = np.zeros((300, 448, 3), np.uint8)
    marked[:, 74:374] = 200  # the centre square of a picture whose shorter side is 300
    crop = eval_crop(Image.fromarray(marked), 32)
    assert crop.shape == (32, 32, 3) and (crop[:, 1:-1] == 200).all()
    for width, height in ((224, 224), (50, 400), (225, 1000), (3, 2)):
        assert eval_crop(Image.fromarray(noise(height, width, 3)), 48).shape == (48, 48, 3)
    boxed, smooth = (eval_crop(Image.fromarray(marked), 32, resample=f) for f in ("box", "lanczos"))
    assert not np.array_equal(boxed, smooth)


def test_train_crop_covers_what_the_paper_says():
    """On a picture whose pixel values are its coordinates, a crop tells its place and scale."""
    side = 512
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side)[:, None] // 2, np.arange(side) // 2
    picture, rng = Image.fromarray(ramp), np.random.default_rng(0)
    spans, tops = [], []
    for _ in range(200):
        crop = train_crop(picture, 32, rng).astype(float)
        assert crop[-1, 0, 0] > crop[0, 0, 0] and crop[0, -1, 1] > crop[0, 0, 1], "never mirrored"
        spans.append((crop[-1, 0, 0] - crop[0, 0, 0]) * 2 * 32 / 31 / side)
        tops.append(crop[0, 0, 0] * 2 / side)
    # 224 of a shorter side of 384 to 256 pixels.
    assert 0.55 < min(spans) < 0.62 and 0.83 < max(spans) < 0.90
    assert min(tops) < 0.03 and 0.3 < max(tops) < 0.43
    twice = [train_crop(picture, 32, np.random.default_rng(5)) for _ in range(2)]
    assert np.array_equal(*twice)


def test_cifar_augment():
    """Every result is one of the 2 * 9 * 9 crops of the reflection-padded picture, and all of them come up."""
    image = noise(32, 32, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {
        np.ascontiguousarray(source[i : i + 32, j : j + 32]).tobytes()
        for source in (padded, padded[:, ::-1]) for i in range(9) for j in range(9)
    }
    results = data.cifar_augment(np.stack([image] * 4000), np.random.default_rng(0))
    assert results.shape == (4000, 32, 32, 3) and {picture.tobytes() for picture in results} == crops


# --- bad input


def test_truncated_files_are_named(tmp_path, palette):
    def expect(message: str, split: str = "train", path: Path = tmp_path):
        with pytest.raises(ValueError, match=message):
            data.load(str(path), split)

    def cut(path: Path, by: int = 7):
        path.write_bytes(path.read_bytes()[:-by])

    write_cifar10(tmp_path / "c")
    cut(tmp_path / "c" / "data_batch_3.bin")
    expect(r"data_batch_3\.bin: truncated: got 9212 bytes, expected a multiple of 3073", path=tmp_path / "c")
    (tmp_path / "c" / "data_batch_3.bin").unlink()
    expect(r"data_batch_3\.bin: missing", path=tmp_path / "c")

    stl = tmp_path / "s"
    stl.mkdir()
    noise(2, 3, 96, 96).tofile(stl / "train_X.bin")
    expect(r"train_y\.bin: missing", path=stl)
    np.array([1, 11], np.uint8).tofile(stl / "train_y.bin")
    expect("got labels from 0 to 10, expected 0 to 9", path=stl)
    np.array([1], np.uint8).tofile(stl / "train_y.bin")
    expect("got 1 labels, expected 2, one a picture", path=stl)
    cut(stl / "train_X.bin")
    expect(r"train_X\.bin: truncated: got 55289 bytes, expected a multiple of 27648", path=stl)

    for zipped in (False, True):
        root = tmp_path / f"i{zipped}"
        write_idx(root, zipped)
        cut(next(root.glob("train-images*")))
        expect(r"train-images-idx3-ubyte.*: truncated", path=root)
        next(root.glob("train-images*")).write_bytes(b"\x1f\x8bnonsense")
        expect(r"train-images-idx3-ubyte.*: (truncated or not gzip|got a start of)", path=root)

    write_idx(tmp_path / "labels", False)
    (tmp_path / "labels" / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([0, 1, 2, 9], np.uint8)))
    expect(r"classes differ: \[9\] are in test and not in train", "test", tmp_path / "labels")

    tokens = tmp_path / "t"
    data.save_tokens(data.load("builtin:emoji").rows(slice(0, 9)), tokens, palette)
    (tokens / "meta.json").rename(tokens / "away")
    expect("has no meta.json: it was not finished", path=tokens)
    (tokens / "away").rename(tokens / "meta.json")
    whole = (tokens / "tokens.npy").read_bytes()
    cut(tokens / "tokens.npy")
    expect(r"tokens\.npy: truncated", path=tokens)
    (tokens / "tokens.npy").write_bytes(whole[:-2] + b"\x40\x00")
    expect(r"tokens\.npy: picture 8 has tokens from \d+ to 64, expected 0 to 63", path=tokens)
    (tokens / "tokens.npy").write_bytes(whole)
    (tokens / "labels.npy").unlink()
    expect(r"labels\.npy: missing", path=tokens)

    openai = tmp_path / "o"
    openai.mkdir()
    np.save(openai / "a_trX.npy", np.full((3, 1024), 512))
    expect(r"a_trX\.npy: picture 0 has tokens from 512 to 512, expected 0 to 511", path=openai)
    np.save(openai / "a_trX.npy", np.zeros((3, 1000), np.int64))
    expect(r"expected integers \(N, a square number\)", path=openai)
    np.save(openai / "a_trX.npy", np.zeros((3, 1024), np.int64))
    np.save(openai / "a_trY.npy", np.array([[0, 1], [1, 0], [1, 1]]))
    expect(r"a_trY\.npy: row 2 is not one-hot", path=openai)
    np.save(openai / "a_trY.npy", np.eye(2))
    expect("got 2 labels, expected 3, one a picture", path=openai)
    cut(openai / "a_trX.npy")
    expect(r"a_trX\.npy: truncated", path=openai)


def test_unreadable_pictures_are_named_or_counted(tmp_path):
    write_folder(tmp_path)
    bad = tmp_path / "cat" / "0.png"
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cat/0\.png: unreadable picture"):
        data.load(str(tmp_path))
    pictures = data.load(str(tmp_path), holdout=0, skip_bad=True)
    assert pictures.skipped == ("cat/0.png",) and len(pictures) == 5 and pictures.labels.tolist() == [0, 0, 1, 1, 1]


def test_loose_pictures_are_read_and_have_no_labels(tmp_path):
    write_folder(tmp_path / "train")
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "train" / "stray.png")
    write_folder(tmp_path / "valid", classes=(".",))
    write_folder(tmp_path / "test", classes=("owl",))
    pictures = data.load(str(tmp_path))
    assert len(pictures) == 7 and pictures.labels is None
    with pytest.raises(ValueError, match=r"labels are missing: stray\.png lies beside .* \['cat', 'dog'\]"):
        pictures.labelled()
    with pytest.raises(ValueError, match="labels are missing: its pictures lie in no subfolders"):
        data.load(str(tmp_path), "valid").labelled()
    assert len(data.load(str(tmp_path), "train+valid")) == 10 and len(data.load(str(tmp_path), "test")) == 3


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    exact = write_folder(tmp_path / "elsewhere" / "deep", classes=("dog",), size=(32, 32))
    write_folder(tmp_path / "set", classes=("cat",))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    (tmp_path / "set" / "owl").symlink_to(tmp_path / "gone")
    said = r"1 other files \(owl\), 2 links back to a folder they lie in \(cat/again\); 1 without a suffix"
    with pytest.warns(UserWarning, match=said):
        pictures = data.load(str(tmp_path / "set"), holdout=0)
    assert pictures.classes == ("cat", "dog") and pictures.labels.tolist() == [0] * 3 + [1] * 3
    assert {picture.tobytes() for picture in pictures.images[3:]} == {picture.tobytes() for picture in exact.values()}


def test_what_is_passed_over_is_said(tmp_path):
    for hidden in (".ipynb_checkpoints", "cat/.thumbs"):
        write_folder(tmp_path / hidden, classes=("old",))
    write_folder(tmp_path)
    (tmp_path / "owl").mkdir()
    for name in ("cat/notes.txt", "cat/a.heic", "dog/b.heic", "dog/.hidden.png"):
        (tmp_path / name).write_text("no picture")
    with pytest.warns(UserWarning) as told:
        assert data.load(str(tmp_path), holdout=0).classes == ("cat", "dog")
    assert str(told[0].message) == (
        f"{tmp_path}: passed over 2 hidden folders (.ipynb_checkpoints), 3 other files (cat/a.heic), 1 hidden files "
        "(dog/.hidden.png), 1 folders without pictures (owl); 2 .heic, 1 .txt"
    )
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for valid in ("valid", "val"):
        (tmp_path / valid).mkdir()
    with pytest.raises(ValueError, match="got both valid/ and val/"):
        data.load(str(tmp_path))


def test_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    """Held out and not picked: never opened. Whoever reads, in whatever tasks, the pictures are the same."""
    write_folder(tmp_path, n=30)
    opened, real = [], igpt.data.workers.square
    monkeypatch.setattr(igpt.data.workers, "square", lambda path, *how: opened.append(path) or real(path, *how))
    whole = data.load(str(tmp_path), "train+valid", crop="train")
    assert len(set(opened)) == len(opened) == 60
    kept, held = data.hold_out(60, 0.2)
    for split, rows in (("train", kept[::5]), ("valid", held[::5])):
        opened.clear()
        few = data.load(str(tmp_path), split, crop="train", holdout=0.2, pick=lambda n: np.arange(0, n, 5))
        assert len(opened) == len(rows) == len(few) and np.array_equal(few.images, whole.images[rows])
        assert np.array_equal(few.labels, whole.labels[rows])
    monkeypatch.setattr(igpt.data.workers, "BATCH", 7)
    assert np.array_equal(data.load(str(tmp_path), "train+valid", crop="train", workers=2).images, whole.images)


def test_workers_leave_ctrl_c_to_their_parent():
    context, initializer = multiprocessing.get_context("spawn"), igpt.data.workers.die_with_parent
    with ProcessPoolExecutor(1, mp_context=context, initializer=initializer) as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_workers_import_no_torch():
    code = "import sys, igpt.data.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"])
def test_mangled_pictures_raise_only_value_error(tmp_path, kind):
    path, rng = tmp_path / f"a.{kind}", np.random.default_rng(0)
    Image.fromarray(noise(24, 24, 3)).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(60):
        mangled = whole[: rng.integers(1, len(whole) + 1)].copy()
        where = rng.integers(0, min(len(mangled), 200), 4)
        mangled[where] = rng.integers(0, 256, 4)
        path.write_bytes(mangled.tobytes())
        try:
            assert square(path, 8).shape == (8, 8, 3)
        except ValueError as error:
            assert str(path) in str(error)


def test_a_picture_too_slim_for_a_crop_is_refused(tmp_path):
    """Its short side resized to 224 pixels, a file of 100 bytes would take gigabytes."""
    for size, fits in (((1, 2000), True), ((2001, 1), False), ((1, 300_000), False)):
        Image.new("RGB", size).save(tmp_path / "slim.png")
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"slim\.png: .* at most 2000 : 1"):
            assert square(tmp_path / "slim.png", 8).shape == (8, 8, 3)


def test_bad_arguments(tmp_path, palette):
    for arguments, message in (
        ({"spec": "builtin:faces"}, "spec: got 'builtin:faces', expected 'builtin:emoji', a folder, or one of"),
        ({"spec": str(tmp_path / "absent")}, "spec: got .*absent"),
        ({"spec": ""}, "spec: got ''"), ({"spec": "folder:"}, "spec: got 'folder:'"),
        ({"spec": f"cifar10:{tmp_path}"}, "spec: found no cifar10 files at"),
        ({"spec": str(tmp_path)}, "no pictures here"),
        ({"split": "validation"}, "split: got 'validation', expected one of"),
        ({"split": "unlabeled"}, "split: builtin:emoji has no unlabeled pictures"),
        ({"labels": "colour"}, "labels: got 'colour', expected one of"),
        ({"holdout": 1.0}, "holdout: got 1.0"),
        ({"size": 0}, "size: got 0"), ({"seed": -1}, "seed: got -1"), ({"workers": -1}, "workers: got -1"),
        ({"resample": "nicest"}, "resample: got 'nicest', expected one of"),
        ({"spec": str(tmp_path), "crop": "odd"}, "crop: got 'odd'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(**{"spec": "builtin:emoji", **arguments})
    emoji = data.load("builtin:emoji").rows(slice(0, 4))
    with pytest.raises(ValueError, match="expected the model's vocabulary of 512"):
        data.Pictures(name="x", size=(1, 1), tokens=np.zeros((2, 1), np.uint16), vocab=512).encoded(palette)
    data.save_tokens(emoji, tmp_path / "t", palette)
    with pytest.raises(ValueError, match=r"size: got 48, but .* holds tokens of pictures of \(32, 32\)"):
        data.load(str(tmp_path / "t"), size=48)
    with pytest.raises(ValueError, match=r"palette: got .* but .* holds tokens of"):
        data.load(str(tmp_path / "t")).encoded(emoji.palette)
    other = data.Pictures(name="other", size=(32, 32), images=emoji.images, labels=emoji.labels * 0, classes=("a",))
    with pytest.raises(ValueError, match=r"classes differ: only in builtin:emoji/train .* only in other \['a'\]"):
        data.same_classes(emoji, other)
    with pytest.raises(ValueError, match="palette: other has none of its own"):
        other.encoded()

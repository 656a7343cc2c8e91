"""Picture files to squares: the paper's crops and augmentation (Chen et al. 2020, and OpenAI's code where it says).

Which filter the paper resized with is [open]; here it is an argument, by default Pillow's antialiased "bilinear", the
one that Hugging Face's processor has. Imports numpy and Pillow only: worker processes start quickly.
"""

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FILTERS = {f.name.lower(): f for f in Image.Resampling}
SLIMMEST = 2000  # a picture's long side over its short one: a crop's 224 pixels of the short one make 0.4 GB of it
# What Pillow's decoders raise for broken files (UnidentifiedImageError is an OSError).
BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, MemoryError, struct.error,
    zlib.error, Image.DecompressionBombError,
)


def check_filter(resample: str) -> Image.Resampling:
    if resample not in FILTERS:
        raise ValueError(f"resample: got {resample!r}, expected one of {sorted(FILTERS)}")
    return FILTERS[resample]


def open_picture(path: str | Path) -> Image.Image:
    """As to_rgb has it, upright by its EXIF orientation. Raises ValueError naming an unreadable file."""
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file), file)
    except BROKEN as error:
        raise ValueError(f"{path}: unreadable picture: {type(error).__name__}: {error}") from error


def to_rgb(picture: Image.Image, file: Image.Image | None = None) -> Image.Image:
    """8-bit RGB, transparency on white. Greys of more than 8 bits are scaled: white is the largest number of the bits
    of the `file` that the picture is from (default: itself), or 1 for floats. Raises ValueError where white isn't
    known: 32-bit and signed integers, floats outside of [0, 1]; and for sides beyond SLIMMEST."""
    if max(picture.size) > SLIMMEST * min(picture.size):
        raise ValueError(f"got {picture.width} x {picture.height}, expected sides of at most {SLIMMEST} : 1")
    if picture.mode.startswith(("I", "F")):
        return wide_grey(picture, file or picture)
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    return picture.convert("RGB")


def wide_grey(picture: Image.Image, file: Image.Image) -> Image.Image:
    """Modes I;16 (and its relatives), I and F, which Pillow's own convert would clip at 255."""
    grey, tags = np.asarray(picture), getattr(file, "tag_v2", {})  # TIFF's: 258 the bits, 262 whether 0 is white
    if picture.mode == "F":
        if not (grey.min() >= 0 and grey.max() <= 1):
            raise ValueError(f"got floats from {grey.min()} to {grey.max()}, expected 0 (black) to 1 (white)")
        top = 1
    elif picture.mode == "I" and file.format not in ("PNG", "PPM"):  # these two are unsigned, of 16 bits
        raise ValueError("got 32-bit or signed integers, expected unsigned ones of at most 16 bits")
    else:
        top = 2 ** tags.get(258, (16,))[0] - 1
    share = 1 - grey / top if tags.get(262) == 0 else grey / top
    share[grey == picture.info.get("transparency", -1)] = 1
    return Image.fromarray(np.rint(255 * share).astype(np.uint8)).convert("RGB")


def shorter_side(picture: Image.Image, to: int, resample: str) -> Image.Image:
    """Resized so that the shorter side is `to`."""
    scale = to / min(picture.size)
    width, height = (max(to, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), check_filter(resample))


def eval_crop(picture: Image.Image, size: int, rng=None, resample: str = "bilinear") -> np.ndarray:
    """ImageNet's evaluation crop: shorter side 224, centre 224x224, then size x size: uint8 (size, size, 3)."""
    picture = shorter_side(picture, 224, resample)
    left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
    return stretch(picture.crop((left, top, left + 224, top + 224)), size, resample=resample)


def train_crop(picture: Image.Image, size: int, rng: np.random.Generator, resample: str = "bilinear") -> np.ndarray:
    """ImageNet's training crop: shorter side random in 256..384, a random 224x224, no flip, then size x size."""
    picture = shorter_side(picture, int(rng.integers(256, 385)), resample)
    left, top = int(rng.integers(picture.width - 223)), int(rng.integers(picture.height - 223))
    return stretch(picture.crop((left, top, left + 224, top + 224)), size, resample=resample)


def stretch(picture: Image.Image, size: int, rng=None, resample: str = "bilinear") -> np.ndarray:
    """The whole picture as size x size, whatever its proportions (what Hugging Face's processor does)."""
    return np.asarray(picture.resize((size, size), check_filter(resample)))


CROPS: dict[str, Callable] = {"eval": eval_crop, "train": train_crop, "stretch": stretch}


def square(path: str | Path, size: int, crop: str = "eval", seed=0, resample: str = "bilinear") -> np.ndarray:
    """A picture file as uint8 (size, size, 3) by one of CROPS; one that has that size already is taken as it is."""
    return fitted(open_picture(path), size, crop, seed, resample)


def fitted(picture: Image.Image, size: int, crop: str = "eval", seed=0, resample: str = "bilinear") -> np.ndarray:
    """The same of an open picture, RGB."""
    if picture.size == (size, size):
        return np.asarray(picture)
    return CROPS[crop](picture, size, np.random.default_rng(seed), resample)


def resize_all(images: np.ndarray, size: int, resample: str = "bilinear") -> np.ndarray:
    """uint8 (N, H, W, 3), possibly a memory map -> (N, size, size, 3): STL-10's 96 -> 32."""
    if images.shape[1:3] == (size, size):
        return images
    out = np.empty((len(images), size, size, 3), np.uint8)

    def one(i: int) -> None:
        out[i] = stretch(Image.fromarray(np.ascontiguousarray(images[i])), size, resample=resample)

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(one, range(len(images))):
            pass
    return out


def cifar_augment(images: np.ndarray, rng: np.random.Generator, pad: int = 4) -> np.ndarray:
    """Fine-tuning on CIFAR: reflection-pad each side by 4, a random crop of the padded picture or of its mirror image.

    uint8 (B, H, W, 3) -> the same shape."""
    return shifted(images, pad, *shifts(len(images), rng, pad))


def shifts(B: int, rng: np.random.Generator, pad: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What cifar_augment draws for B pictures: rows and columns to begin at, and which are mirrored, each (B, 1)."""
    top, left = rng.integers(0, 2 * pad + 1, (2, B, 1))
    return top, left, rng.random((B, 1)) < 0.5


def shifted(images: np.ndarray, pad: int, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    B, H, W, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    rows, columns = top + np.arange(H), left + np.arange(W)
    columns = np.where(mirrored, W + 2 * pad - 1 - columns, columns)
    return padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]

"""Many small pictures as one PNG."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

BACKGROUND, HIDDEN = 255, 128
SOFTWARE = "igpt"  # in the PNGs: a picture of ours may be replaced


def tile(images, columns: int, gap: int = 2) -> np.ndarray:
    """uint8 (B, H, W, 3), array or tensor, in rows of `columns` -> one uint8 picture, `gap` pixels between them."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images: got {images.dtype} {images.shape}, expected uint8 (B, H, W, 3)")
    if columns < 1:
        raise ValueError(f"columns: got {columns}, expected at least 1")
    (B, H, W, _), columns = images.shape, min(columns, len(images))
    rows = -(-B // columns)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, 3), BACKGROUND, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image
    return sheet


def beside(truth, completed, keep: int):
    """Rows of a grid: the first `keep` pixels of each picture with the rest in grey, its completions, the picture.

    truth uint8 (B, H, W, 3) and completed (B * n, H, W, 3), tensors -> (B * (n + 2), H, W, 3)."""
    given = truth.clone()
    given.flatten(1, 2)[:, keep:] = HIDDEN
    completed = completed.unflatten(0, (len(truth), -1))
    return torch.cat([given[:, None], completed, truth[:, None]], 1).flatten(0, 1)


def prepare(path, force: bool = False) -> None:
    """Make the folder of a PNG to come. Raises ValueError if it could not be written, before there is one, and for a
    file that is no picture of ours, unless `force`."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"out: got {path}, expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not force and not is_ours(path):
        raise ValueError(f"out: {path} is there already and is no picture of igpt's; --force replaces it")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"out: cannot write a file at {path}")


def is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as file:
            return file.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):  # what Pillow raises for a file that is no picture, or a broken one
        return False


def save(path, images, columns: int, gap: int = 2, scale: int = 1) -> Path:
    """Write `tile(images, columns, gap)` as a PNG, every pixel `scale` x `scale`; makes the folder. What stood there
    stays until the new one is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = tile(images, columns, gap).repeat(scale, 0).repeat(scale, 1)
    signed = PngInfo()
    signed.add_text("Software", SOFTWARE)
    unfinished = path.with_name(f"{path.name}.part")
    Image.fromarray(sheet).save(unfinished, format="PNG", pnginfo=signed)
    return unfinished.replace(path)

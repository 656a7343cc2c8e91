"""Many small pictures as one PNG."""

from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUND = 255


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


def save(path, images, columns: int, gap: int = 2, scale: int = 1) -> Path:
    """Write `tile(images, columns, gap)` as a PNG, every pixel `scale` x `scale`; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = tile(images, columns, gap).repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(sheet).save(path, format="PNG")
    return path

"""The 512 colours: pixels to tokens and back.

    palette = Palette.fit(images, k=512, seed=0)
    tokens = palette.encode(images)             # uint8 (B, H, W, 3) -> int64 (B, H*W), raster order
    images = palette.decode(tokens, (32, 32))   # -> uint8 (B, 32, 32, 3)
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch

from igpt import ops
from igpt.kernels import reference
from igpt.palette import kmeans
from igpt.palette.lookup import ColourTable

LARGEST = 65535  # colours: tokens are stored as uint16, and the table keeps one value for "not seen yet"
ROUNDING = 1e-5  # others' k-means leave [-1, 1] by an ulp; such centres are kept as they are
# What numpy's reader of a .npy header, which is a Python literal, raises for broken ones.
BROKEN_NPY = (ValueError, EOFError, OverflowError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError)
FILES = ("palette.npy", "kmeans_centers.npy", "preprocessor_config.json")


class Palette:
    """Colours `centres`, fp32 (k, 3) in [-1, 1] (pixel/127.5 - 1). Immutable by convention, compared by value."""

    def __init__(self, centres):
        """Raises ValueError unless centres (array, tensor or nested list) are (k, 3), finite and in [-1, 1]."""
        if torch.is_tensor(centres):
            centres = centres.detach().float().cpu().numpy()
        values = np.array(centres, dtype=np.float32, order="C")
        if values.ndim != 2 or values.shape[1] != 3 or not 1 <= len(values) <= LARGEST:
            raise ValueError(f"centres: got shape {values.shape}, expected (k, 3) with 1 <= k <= {LARGEST}")
        if not np.isfinite(values).all():
            raise ValueError(f"centres: got {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
        if np.abs(values).max() > 1 + ROUNDING:
            raise ValueError(
                f"centres: got values from {values.min():g} to {values.max():g}, expected [-1, 1] (pixel/127.5 - 1)"
            )
        self.centres = torch.from_numpy(values)

    def __len__(self) -> int:
        return len(self.centres)

    def __eq__(self, other) -> bool:
        return isinstance(other, Palette) and torch.equal(self.centres, other.centres)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Palette({len(self)} colours, {self.fingerprint[:12]})"

    def __reduce__(self):
        # Data loaders pickle and copy: the table is rebuilt on sight and never travels.
        return Palette, (self.centres,)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the centres' bytes: token sets carry it."""
        return hashlib.sha256(self.centres.numpy().astype("<f4").tobytes()).hexdigest()

    @cached_property
    def colours(self) -> torch.Tensor:
        """The colours as uint8 (k, 3)."""
        return reference.palette_decode(torch.arange(len(self), device="cpu"), self.centres)

    @cached_property
    def table(self) -> ColourTable:
        """The exact look-up of uint8 pixels on a CPU: numpy uint8 (..., 3) -> uint16 (...)."""
        return ColourTable(self.centres.numpy())

    @classmethod
    def fit(cls, images, k: int = 512, seed: int = 0) -> "Palette":
        """k-means on the pixels of uint8 images (..., 3), on the GPU for tensors of one; see kmeans.py.

        Raises ValueError for fewer than k distinct colours, or a seed that isn't in [0, 2^32)."""
        if not isinstance(k, int) or not 1 <= k <= LARGEST:
            raise ValueError(f"k: got {k!r}, expected an integer from 1 to {LARGEST}")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed: got {seed!r}, expected an integer from 0 to {2**32 - 1}")
        images = _pixels(images)
        return cls(kmeans.kmeans(images, k, seed))

    def encode(self, images, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Nearest colours, the lowest index on ties: uint8 (B, H, W, 3), array or tensor -> int64 (B, H*W).

        Bit-equal to reference.palette_encode on every device: CPU pictures by an exact table, GPU pictures by the
        kernel. With `size`, the model's (height, width), pictures of another size are refused."""
        images = _pixels(images)
        if images.ndim != 4:
            raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, H, W, 3)")
        if size is not None and tuple(images.shape[1:3]) != tuple(size):
            raise ValueError(f"images: got pictures of {tuple(images.shape[1:3])}, expected the model's {tuple(size)}")
        if torch.is_tensor(images):
            return ops.palette_encode(images, self.centres.to(images.device)).flatten(1)
        return torch.from_numpy(self.table(images).astype(np.int64)).flatten(1)

    def decode(self, tokens, size: tuple[int, int]) -> torch.Tensor:
        """Colours of integer tokens (B, H*W) as pictures uint8 (B, H, W, 3), on the tokens' device. A token that the
        palette doesn't have raises ValueError on a CPU and is black on a GPU."""
        tokens = tokens if torch.is_tensor(tokens) else torch.as_tensor(tokens)
        if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.dim() != 2:
            raise ValueError(f"tokens: got {tokens.dtype} {tuple(tokens.shape)}, expected integers (B, H*W)")
        if tokens.shape[1] != size[0] * size[1]:
            raise ValueError(f"tokens: got {tokens.shape[1]} a picture, expected {size[0]} * {size[1]} = H * W")
        if not tokens.is_cpu:
            return ops.palette_decode(tokens, self.centres.to(tokens.device)).unflatten(1, tuple(size))
        tokens = tokens.long()
        if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < len(self):
            raise ValueError(
                f"tokens: got values from {tokens.min()} to {tokens.max()}, expected 0 to {len(self) - 1}"
            )
        return self.colours[tokens].unflatten(1, tuple(size))

    def require(self, vocab: int) -> "Palette":
        """Itself, or ValueError if a model of `vocab` tokens cannot use this palette."""
        if len(self) != vocab:
            raise ValueError(f"palette: got {len(self)} colours, expected the model's vocabulary of {vocab}")
        return self

    def save(self, path) -> None:
        """Writes the centres as .npy, the format of OpenAI's kmeans_centers.npy. What stood there stays until they are
        whole."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.new")
        with open(unfinished, "wb") as file:
            np.save(file, self.centres.numpy(), allow_pickle=False)
        unfinished.replace(path)

    @classmethod
    def load(cls, path) -> "Palette":
        """From .npy (ours, or OpenAI's kmeans_centers.npy), Hugging Face's preprocessor_config.json ("clusters"), or a
        directory with one of those. Raises ValueError naming the file."""
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in FILES if (path / name).is_file()]
            if not found:
                raise ValueError(f"path: {path} holds none of {FILES}")
            path = found[0]
        try:
            if path.suffix == ".json":
                return cls(json.loads(path.read_text(encoding="utf-8"))["clusters"])
            return cls(load_npy(path))
        except KeyError as error:
            raise ValueError(f"{path}: got no {error} key, expected Hugging Face's preprocessor_config.json") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a palette: {error}") from error


def load_npy(path: Path) -> np.ndarray:
    """A .npy, memory-mapped: one whose header promises more than the file holds is refused before any allocation.

    Raises ValueError naming the file if it is missing, truncated, pickled, or no .npy."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN_NPY as error:
        raise ValueError(f"{path}: truncated or not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path}: got an npz archive, expected a .npy file")
    return array


def _pixels(images) -> np.ndarray | torch.Tensor:
    """uint8 (..., 3): tensors of a GPU as they are, all else as an array. Raises ValueError otherwise."""
    if not torch.is_tensor(images):
        images = np.asarray(images)
    elif images.is_cpu:
        images = images.numpy()
    if images.dtype not in (np.uint8, torch.uint8) or tuple(images.shape[-1:]) != (3,):
        raise ValueError(f"images: got {images.dtype} {tuple(images.shape)}, expected uint8 (..., 3)")
    return images

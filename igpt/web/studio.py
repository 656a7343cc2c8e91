"""What the page asks of a model: facts, a file's picture as tokens, completions a row at a time. Plain values in and
out, as JSON has them; whatever comes from outside is checked here, and refused with a ValueError in words."""

import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from igpt import data, sample
from igpt.convert.tensors import read_json
from igpt.data.crops import BROKEN, fitted, to_rgb

FILE_BYTES = 16 << 20  # of an upload, at most
FILE_PIXELS = 50_000_000  # of the picture in it: a small file may unpack to any size
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's others include EPS, for which it runs a program
COMPLETIONS = 16  # at once, at most
HOTTEST = 4.0


class Studio:
    """A model and its palette, for pictures of side x side. `name` is what the page calls it."""

    def __init__(self, model, palette, side: int, name: str, probe: dict | None = None):
        self.model, self.palette, self.side, self.name, self.probe = model, palette, side, name, probe

    def facts(self) -> dict:
        """All that the page has to know; `blank` is the token of white paper."""
        white = np.full((1, 1, 1, 3), 255, np.uint8)
        return {
            "name": self.name, "side": self.side, "parameters": self.model.num_parameters(),
            "trained": str(self.model.trained or ""), "colours": self.palette.colours.tolist(),
            "blank": self.palette.encode(white).item(), "probe": self.probe,
            "most": {"bytes": FILE_BYTES, "completions": COMPLETIONS, "temperature": HOTTEST},
        }  # fmt: skip

    def tokens_of(self, file: bytes) -> list[int]:
        """A picture file, cropped as `igpt complete` does and in the palette's colours."""
        return self.quantised(fitted(open_upload(file), self.side))

    def emoji(self, i: int) -> list[int]:
        """A built-in picture that `igpt train` holds out; they repeat from their number on."""
        return self.quantised(self.held_out[i % len(self.held_out)])

    @cached_property
    def held_out(self) -> np.ndarray:
        return data.load("builtin:emoji", "test", size=self.side).images

    def quantised(self, image: np.ndarray) -> list[int]:
        return self.palette.encode(image[None])[0].tolist()

    def complete(self, wish: dict) -> Iterator[list[list[int]]]:
        """The rows below the first wish["rows"] of wish["tokens"], of wish["completions"] pictures, as they are drawn:
        side tokens for each picture. No rows kept: whole samples. What is wrong with a wish is raised at the call."""
        side, vocab = self.side, self.model.config.vocab
        tokens = wish.get("tokens")
        if not isinstance(tokens, list) or len(tokens) != side * side or {type(t) for t in tokens} != {int}:
            raise ValueError(f"tokens: expected a list of {side * side} integers")
        if not all(0 <= t < vocab for t in tokens):
            raise ValueError(f"tokens: got values in [{min(tokens)}, {max(tokens)}], expected integers in [0, {vocab})")
        rows = number(wish, "rows", 0, side - 1)
        batch = number(wish, "completions", 1, COMPLETIONS)
        top_k = None if wish.get("top_k") is None else number(wish, "top_k", 1, vocab)
        temperature = number(wish, "temperature", 0, HOTTEST, (int, float))
        seed = number(wish, "seed", 0, 2**53)
        kept = torch.tensor(tokens[: rows * side], dtype=torch.int64).expand(batch, -1)
        drawn = sample.stream(self.model, kept, side, temperature=temperature, top_k=top_k, seed=seed)
        return (row.tolist() for row in drawn)


def number(wish: dict, name: str, low: float, high: float, kinds: tuple = (int,)):
    """wish[name], if it is a number from low to high; raises ValueError otherwise. True is none, and NaN neither."""
    value = wish.get(name)
    if type(value) not in kinds or not low <= value <= high:
        kind = "an integer" if kinds == (int,) else "a number"
        raise ValueError(f"{name}: got {value!r:.40}, expected {kind} from {low} to {high}")
    return value


def open_upload(file: bytes) -> Image.Image:
    """As data.crops.open_picture, of bytes that nobody vouches for."""
    if len(file) > FILE_BYTES:
        raise ValueError(f"picture: got {len(file):,} bytes, expected at most {FILE_BYTES:,}")
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
            if picture.width * picture.height > FILE_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height}, more than {FILE_PIXELS:,} pixels")
            return to_rgb(ImageOps.exif_transpose(picture), picture)
    except Image.UnidentifiedImageError:
        raise ValueError(f"picture: this file is none of {', '.join(FORMATS)}, or is damaged") from None
    except BROKEN as error:
        raise ValueError(f"picture: this file cannot be read: {error}") from error


def probe_of(source: str) -> dict | None:
    """What `igpt probe --out` wrote into a run's directory or its folder `probe`: {"layers": {layer: accuracy}, ...}.

    None if there is none; raises ValueError for a file that is something else."""
    found = [path for path in (Path(source, "probe.json"), Path(source, "probe", "probe.json")) if path.is_file()]
    if not found:
        return None
    report = read_json(found[0])
    try:
        layers = {int(layer): float(row["valid"]) for layer, row in report["layers"].items()}
        told = {name: int(report[name]) for name in ("best_layer", "classes")}
        told |= {"strength": float(report["strength"]), "pictures": [int(n) for n in report["pictures"]]}
        shares = {name: float(report[name]) for name in ("valid_accuracy", "test_accuracy")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{found[0]}: not a report of igpt probe: {type(error).__name__}: {error}") from error
    if not layers or told["classes"] < 1 or not all(0 <= share <= 1 for share in (*layers.values(), *shares.values())):
        raise ValueError(f"{found[0]}: not a report of igpt probe: expected accuracies in [0, 1]")
    return {"layers": layers, **told, **shares}

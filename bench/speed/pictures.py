"""Whole pictures on a CPU, in pictures a second: colours looked up, a palette fitted, a folder of files encoded; ours
against Hugging Face's processor and scikit-learn's k-means. The processor is slow: it does fewer pictures, and its time
is scaled up, for it is linear."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.cases import Timed, palette_cube
from bench.cost import Cost
from bench.rows import Row
from bench.speed.measure import Run, Variant, rows_of
from igpt import Palette, data
from igpt.data.encode import encode_folder
from igpt.programs.palette import mse

SIDE = 32


@dataclass(frozen=True)
class PictureCase(Timed):
    """`op` done to B pictures, whose bytes are read and whose tokens are written."""

    op: str
    B: int
    bytes: int
    unit, needs = "pictures", ()

    @property
    def rate(self) -> int:
        return self.B

    @property
    def labels(self) -> dict:
        return {"op": self.op, "B": self.B, "N": SIDE * SIDE, "dtype": "fp32", "direction": "fwd"}

    def cost(self) -> Cost:
        return Cost(0, self.bytes)


def pictures(count: int) -> np.ndarray:
    """The built-in pictures, uint8 (count, 32, 32, 3), repeated as needed."""
    images = data.load("builtin:emoji", "train+valid").images
    return images[np.arange(count) % len(images)]


def processor(case: PictureCase, few: Callable[[], list], count: int) -> Variant:
    """Hugging Face's, without torchvision, on `count` pictures."""

    def build(case):
        from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

        size, colours = {"height": SIDE, "width": SIDE}, palette_cube().numpy()
        convert = ImageGPTImageProcessorPil(clusters=colours, size=size, do_normalize=True)
        return lambda: convert(few(), return_tensors="np")

    note = f"ImageGPTImageProcessorPil on {count} pictures, time scaled to {case.B}"
    return Variant("hugging face", case, build, note, done=count / case.B)


def lookup(run: Run, count: int = 4096, theirs: int = 256) -> Iterator[Row]:
    """Palette.encode with its table built, and building it each time, against the processor (its PIL variant)."""
    images, palette = pictures(count), Palette(palette_cube())
    case, few = PictureCase("palette pictures", count, count * SIDE * SIDE * (3 + 8)), list(images[:theirs])
    variants = [
        Variant("ours", case, lambda case: lambda: palette.encode(images),
                "the table, which fills as colours come, has seen these"),
        Variant("ours, building", case, lambda case: lambda: Palette(palette_cube()).encode(images),
                "a new palette each time: every table is built anew"),
        processor(case, lambda: few, theirs),
    ]  # fmt: skip
    yield from rows_of("model", variants, run, run.timer)


def fit(run: Run, count: int = 256, k: int = 512) -> Iterator[Row]:
    """Palette.fit against scikit-learn's KMeans with one k-means++ start, on the same pixels; notes say how near the
    colours of each come to the pixels."""
    images, found = pictures(count), {}
    x = images.reshape(-1, 3) / 127.5 - 1

    def ours():
        found["ours"] = Palette.fit(images, k).centres.numpy()

    def theirs():
        from sklearn.cluster import KMeans

        found["scikit-learn"] = KMeans(k, n_init=1, random_state=0).fit(x).cluster_centers_

    case = PictureCase("palette fit", count, images.size)
    variants = [
        Variant("ours", case, lambda case: ours, "Palette.fit"),
        Variant("scikit-learn", case, lambda case: theirs, f"KMeans(n_clusters={k}, n_init=1)"),
    ]
    for row in rows_of("model", variants, run, run.timer):
        if row.median_ms:
            error = mse(Palette(found[row.impl]), images)
            row = dataclasses.replace(row, note=f"{row.note}: mean squared error {error} (bytes squared)")
        yield row


def folder(run: Run, count: int = 4096, theirs: int = 256, side: int = 96) -> Iterator[Row]:
    """igpt.encode_folder on PNG files of side x side, read, cropped, looked up and written, all cores, against
    opening the files and the processor."""
    palette = Palette(palette_cube())
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "pictures"), Path(scratch, "tokens")
        source.mkdir()
        paths = [source / f"{i:06}.png" for i in range(count)]
        for image, path in zip(pictures(count), paths):
            Image.fromarray(image).resize((side, side)).save(path)

        def ours():
            shutil.rmtree(out, ignore_errors=True)
            encode_folder(source, out, palette, SIDE, progress=False)

        size = sum(path.stat().st_size for path in paths) + count * SIDE * SIDE * 2
        case = PictureCase("encode folder", count, size)
        note = f"encode_folder of {side}x{side} PNG files, its processes' start included"
        peer = processor(case, lambda: [Image.open(path) for path in paths[:theirs]], theirs)
        yield from rows_of("model", [Variant("ours", case, lambda case: ours, note), peer], run, run.timer)


QUICK, ALL = (lookup,), (lookup, fit, folder)

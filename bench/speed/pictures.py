"""Whole pictures on a CPU, in pictures a second: colours looked up, a palette fitted, a folder of files encoded; ours
against Hugging Face's processor and scikit-learn's k-means. The processor is slow: it does fewer pictures."""

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from bench.cases import Case, palette_cube, pictures
from bench.rows import Row
from bench.speed.measure import Run, together
from igpt import Palette
from igpt.data.encode import encode_folder

SIDE = 32
NOTES = {
    "ours, building": "a new palette each time, every table built anew: that of ours has seen these colours",
    "hugging face": "ImageGPTImageProcessorPil, without torchvision",
    "scikit-learn": "KMeans(n_init=1)",
}


def compared(op: str, count: int, calls: dict[str, Callable], run: Run, theirs: int = 0) -> Iterator[Row]:
    """Rows of calls by name, of `count` pictures each, Hugging Face's of `theirs`."""
    case = Case(op, count, SIDE * SIDE, 0, 0, "fp32")
    few = dataclasses.replace(case, B=theirs)
    group = [(name, few if name == "hugging face" else case) for name in calls]
    return together("model", group, lambda name, *_: calls[name], NOTES, run)


def processor(pictures: Callable[[], list]) -> Callable[[], object]:
    """Hugging Face's; the first call, which is not timed, sets it up."""

    @functools.cache
    def convert():
        from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

        size, colours = {"height": SIDE, "width": SIDE}, palette_cube().numpy()
        return ImageGPTImageProcessorPil(clusters=colours, size=size, do_normalize=True)

    return lambda: convert()(pictures(), return_tensors="np")


def lookup(run: Run, count: int = 4096, theirs: int = 256) -> Iterator[Row]:
    """Palette.encode with its table built, and building it each time, against the processor."""
    images, palette = pictures(count), Palette(palette_cube())
    calls = {
        "ours": lambda: palette.encode(images),
        "ours, building": lambda: Palette(palette_cube()).encode(images),
        "hugging face": processor(lambda: list(images[:theirs])),
    }
    return compared("palette pictures", count, calls, run, theirs)


def fit(run: Run, count: int = 256, k: int = 512) -> Iterator[Row]:
    """Palette.fit against scikit-learn's KMeans with one k-means++ start, on the same pixels; that its colours come as
    near to them, tests/test_palette.py holds."""
    images = pictures(count)
    x = images.reshape(-1, 3) / 127.5 - 1

    def theirs():
        from sklearn.cluster import KMeans

        KMeans(k, n_init=1, random_state=0).fit(x)

    calls = {"ours": lambda: Palette.fit(images, k), "scikit-learn": theirs}
    return compared("palette fit", count, calls, run)


def folder(run: Run, count: int = 4096, theirs: int = 256, side: int = 96) -> Iterator[Row]:
    """igpt.encode_folder on PNG files of side x side, read, cropped, looked up and written, all cores, its processes'
    start included, against opening the files and the processor."""
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

        calls = {"ours": ours, "hugging face": processor(lambda: [Image.open(path) for path in paths[:theirs]])}
        yield from compared("encode folder", count, calls, run, theirs)


QUICK, ALL = (lookup,), (lookup, fit, folder)

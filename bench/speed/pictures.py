"""Whole pictures on a CPU, in pictures a second: colours looked up, a palette fitted, a folder of files encoded; ours
against Hugging Face's processor and scikit-learn's k-means."""

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.cases import Case, palette_cube
from bench.cost import Cost
from bench.rows import Row
from bench.speed.measure import Run, Variant, blank, rows_of
from bench.speed.peers import Absent, importable
from igpt import Palette, data
from igpt.data.encode import encode_folder
from igpt.programs.palette import mse

SIDE = 32


@dataclass(frozen=True)
class Job:
    """One way to do `count` pictures' work; a slow peer may do fewer (`done`), its time scaled up: it is linear."""

    run: Callable[[], object] | Absent
    note: str
    done: int | None = None


def pictures(count: int) -> np.ndarray:
    """The built-in pictures, uint8 (count, 32, 32, 3), repeated as needed."""
    images = data.load("builtin:emoji", "train+valid").images
    return images[np.arange(count) % len(images)]


def processor(palette: Palette):
    """Hugging Face's, without torchvision."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    return ImageGPTImageProcessorPil(clusters=palette.centres.numpy(), size=size, do_normalize=True)


def lookup(run: Run, count: int = 4096, theirs: int = 256) -> Iterator[Row]:
    """Palette.encode with its table built, and building it each time, against the processor (its PIL variant)."""
    images, palette = pictures(count), Palette(palette_cube())
    jobs = {
        "ours": Job(lambda: palette.encode(images), "the table, which fills as colours come, has seen these"),
        "ours, building": Job(
            lambda: Palette(palette_cube()).encode(images), "a new palette each time: every table is built anew"
        ),
    }
    if importable("transformers"):
        convert, few = processor(palette), list(images[:theirs])
        note = f"ImageGPTImageProcessorPil on {theirs} pictures, time scaled to {count}"
        jobs["hugging face"] = Job(lambda: convert(few, return_tensors="np"), note, theirs)
    bytes_ = count * SIDE * SIDE * (3 + 8)
    yield from _rows(run, "palette pictures", count, jobs, "hugging face", "transformers", bytes_)


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

    jobs = {"ours": Job(ours, "Palette.fit")}
    if importable("sklearn"):
        jobs["scikit-learn"] = Job(theirs, f"KMeans(n_clusters={k}, n_init=1)")
    for row in _rows(run, "palette fit", count, jobs, "scikit-learn", "scikit-learn", images.size):
        if row.impl in found:
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

        jobs = {"ours": Job(ours, f"encode_folder of {side}x{side} PNG files, its processes' start included")}
        if importable("transformers"):
            convert = processor(palette)

            def processed():
                convert([Image.open(path) for path in paths[:theirs]], return_tensors="np")

            note = f"Image.open and ImageGPTImageProcessorPil on {theirs} files, time scaled to {count}"
            jobs["hugging face"] = Job(processed, note, theirs)
        bytes_ = sum(path.stat().st_size for path in paths) + count * SIDE * SIDE * 2
        yield from _rows(run, "encode folder", count, jobs, "hugging face", "transformers", bytes_)


def _rows(run: Run, op: str, count: int, jobs: dict[str, Job], peer: str, package: str, bytes_: float) -> Iterator[Row]:
    """The jobs timed in turns, each with its ratio to the peer; a row that says so if the peer's package is absent."""
    case = Case(op, count, SIDE * SIDE, 0, 0, "fp32", direction="fwd")
    jobs = jobs if peer in jobs else jobs | {peer: Job(Absent(f"{package} is not installed"), "")}
    yield from rows_of((
        Variant(
            blank("model", name, case, "cpu", note=job.note), job.run, Cost(0, bytes_),
            scale=count / (job.done or count), rate=count, unit="pictures",
        ) for name, job in jobs.items()
    ), run, run.timer, warm=1)  # fmt: skip


QUICK, ALL = (lookup,), (lookup, fit, folder)

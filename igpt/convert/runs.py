"""A run of `igpt train` as a model at any moment: which of its checkpoints, and the weights in one.

    RUN/checkpoints/step-40/  config.json, palette.npy   as in an export
                              training.json              its step, and its validation loss where that was measured
                              .metadata, *.distcp        torch.distributed.checkpoint's: weights and optimiser state
                              files.json                 the size of each file: what a truncated copy is told by

.metadata is a pickle. Read here, it can only build the few classes of torch that one is made of: weights come out of a
checkpoint without anything in it being executed.
"""

import io
import json
import math
import os
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from igpt.convert.tensors import Lazy, read_json

FOLDER, EXPORT, SIZES, TRAINING = "checkpoints", "export", "files.json", "training.json"
METADATA = ".metadata"
WEIGHTS = "model."  # how the weights' names begin, beside "optimizer."
DTYPES = {f"{dtype}".removeprefix("torch.") for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
DTYPES |= {"int64", "int32"}  # of optimisers' counters
PLAIN = {  # all that a pickle of metadata names
    "torch": {"Size", *DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip
# What a pickle that is broken, or was made for another purpose, raises.
BROKEN = (pickle.UnpicklingError, EOFError, ImportError, AttributeError, LookupError, TypeError, ValueError,
          ArithmeticError, MemoryError, NotImplementedError)  # fmt: skip


class Trained(NamedTuple):
    """Where in its run a checkpoint was made: training.json."""

    step: int
    valid_loss: float | None = None  # nats a pixel; None where that step was not validated

    @classmethod
    def of(cls, path: Path) -> "Trained | None":
        """Of the model in a directory; None if it says nothing. Raises ValueError for another kind of file."""
        if not (path / TRAINING).is_file():
            return None
        values = read_json(path / TRAINING)
        step, loss = values.get("step"), values.get("valid_loss")
        if type(step) is not int or (loss is not None and not (type(loss) in (int, float) and math.isfinite(loss))):
            raise ValueError(f"{path / TRAINING}: got {values!r:.80}, expected a step and a valid_loss")
        return cls(step, loss)

    def __str__(self) -> str:
        return f"step {self.step}" + ("" if self.valid_loss is None else f", validation loss {self.valid_loss:.4f}")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """step-N, by N; whatever else lies there is someone else's."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), key=step_of)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: each file must be there, as long as it was."""
    if not (path / SIZES).is_file():
        return f"{SIZES} is missing"
    try:
        sizes = json.loads((path / SIZES).read_text()).items()
    except (ValueError, AttributeError):
        return f"{SIZES} is not readable"
    for name, size in sizes:
        if not (path / name).is_file():
            return f"{name} is missing"
        if (found := (path / name).stat().st_size) != size:
            return f"{name} has {found} bytes of {size}"
    return None


def best(paths: list[Path]) -> Path | None:
    """The whole checkpoint of the lowest validation loss, the first of equal ones; None if no step was validated."""
    known = [(trained.valid_loss, step_of(path), path) for path in paths
             if damage(path) is None and (trained := Trained.of(path)) and trained.valid_loss is not None]
    return min(known)[2] if known else None


def is_run(path: Path) -> bool:
    return (path / FOLDER).is_dir() and "train" in read_json(path / "config.json")


def resolve(run: Path, step: int | str | None = None) -> Path:
    """The directory that a run stands for as a model. `step`: a checkpoint's, or "last"; by default the best one by
    validation loss, the last one if none was validated, the export if all are gone. Damaged ones are passed over with
    a warning. Raises ValueError naming what there is."""
    if step not in (None, "last") and type(step) is not int:
        raise ValueError(f"step: got {step!r}, expected None, a step or 'last'")
    faults = {path: damage(path) for path in checkpoints(run / FOLDER)}
    whole = [path for path, fault in faults.items() if fault is None]
    for path, fault in faults.items():
        if fault is not None and step in (None, "last", step_of(path)):
            warnings.warn(f"{path} is not taken: {fault}", stacklevel=4)
    if type(step) is int:
        if found := [path for path in whole if step_of(path) == step]:
            return found[0]
        raise ValueError(f"step: {run} has no whole checkpoint of step {step}, only of {[step_of(p) for p in whole]}")
    if whole:
        return (best(whole) if step is None else None) or whole[-1]
    if step is None and (run / EXPORT).is_dir():
        return run / EXPORT
    raise ValueError(f"source: the run {run} has no whole checkpoint yet; the first comes when it is validated")


def read_weights(path: Path) -> dict[str, Lazy]:
    """A checkpoint's weights by our names, by this process alone, however many processes wrote them.

    Raises ValueError if the checkpoint is damaged."""
    if fault := damage(path):
        raise ValueError(f"{path}: {fault}")
    try:
        with open(path / METADATA, "rb") as file:
            metadata = Metadata(file).load()
        places = {(i.fqn, tuple(i.offset)): info for i, info in metadata.storage_data.items() if i.offset is not None}
        entries = {name: entry for name, entry in metadata.state_dict_metadata.items() if name.startswith(WEIGHTS)}
        return {
            name.removeprefix(WEIGHTS): Lazy.stack(*(
                piece(path, chunk.sizes, entry.properties.dtype, places[name, tuple(chunk.offsets)])
                for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets)
            ))
            for name, entry in entries.items()
        }  # fmt: skip
    except BROKEN as error:
        raise ValueError(f"{path / METADATA}: not a checkpoint's: {type(error).__name__}: {error}") from error


def piece(path: Path, shape: torch.Size, dtype: torch.dtype, info) -> Lazy:
    """One process's rows of a tensor: `length` bytes of a file from `offset` on, as torch.save writes them."""
    if info.relative_path != os.path.basename(info.relative_path) or info.transform_descriptors:
        raise ValueError(f"got a tensor in {info.relative_path!r:.80}, expected a plain file of this folder")
    return Lazy(tuple(shape), dtype, (partial(read_piece, path, shape, dtype, info),))


def read_piece(path: Path, shape: torch.Size, dtype: torch.dtype, info) -> torch.Tensor:
    place = f"{path / info.relative_path}, byte {info.offset}"
    with open(path / info.relative_path, "rb") as file:
        file.seek(info.offset)
        saved = io.BytesIO(file.read(info.length))
    try:
        tensor = torch.load(saved, map_location="cpu", weights_only=True)
    except (RuntimeError, *BROKEN) as error:
        raise ValueError(f"{place}: not a tensor: {error}") from error
    if not torch.is_tensor(tensor) or tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{place}: not the {dtype} tensor {tuple(shape)} that {METADATA} names")
    return tensor


class Metadata(pickle.Unpickler):
    """Builds torch.distributed.checkpoint's metadata, and refuses a pickle that names anything else."""

    def find_class(self, module: str, name: str):
        if name not in PLAIN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)

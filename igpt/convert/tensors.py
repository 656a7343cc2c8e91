"""Tensors not read yet, and safetensors files of them, a slab at a time.

Checkpoints come from strangers: a header's sizes, offsets, dtypes and names are checked against the file before
anything is allocated, and each fault is one ValueError naming the file. Reading holds one tensor, writing one tensor
and a slab; neither maps the file.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
JSON_LIMIT = 1 << 20  # bytes: the largest Image GPT needs a tenth of it, and parsed JSON is many times its text
MAX_DIMS = 8
SLAB = 8 << 20  # bytes written at once


@dataclass(frozen=True)
class Lazy:
    """A tensor not read yet: `parts`, read one at a time, are stacked along the first dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Callable[[], torch.Tensor], ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Lazy":
        return cls(tuple(tensor.shape), tensor.dtype, (lambda: tensor.detach().cpu(),))

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Lazy":
        return cls(shape, dtype, (lambda: torch.zeros(shape, dtype=dtype, device="cpu"),))

    @classmethod
    def stack(cls, *tensors: "Lazy") -> "Lazy":
        """Row blocks on top of each other: (a, ...), (b, ...) -> (a + b, ...). Raises ValueError if they don't fit."""
        first = tensors[0]
        if any(t.shape[1:] != first.shape[1:] or t.dtype != first.dtype for t in tensors):
            raise ValueError(f"shapes {[t.shape for t in tensors]} of {[t.dtype for t in tensors]} don't stack")
        rows = sum(t.shape[0] for t in tensors)
        return cls((rows, *first.shape[1:]), first.dtype, tuple(part for t in tensors for part in t.parts))

    def read(self) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0]()
        whole, row = torch.empty(self.shape, dtype=self.dtype, device="cpu"), 0
        for part in self.parts:
            block = part()
            whole[row : row + len(block)] = block
            row += len(block)
        return whole

    def view(self, shape: tuple[int, ...], of: Callable[[torch.Tensor], torch.Tensor]) -> "Lazy":
        """of(this), which has `shape`."""
        return Lazy(shape, self.dtype, (lambda: of(self.read()),))

    def t(self) -> "Lazy":
        return self.view(self.shape[::-1], lambda x: x.t())

    def rows(self, start: int, stop: int) -> "Lazy":
        return self.view((stop - start, *self.shape[1:]), lambda x: x[start:stop])

    def reshape(self, *shape: int) -> "Lazy":
        return self.view(shape, lambda x: x.reshape(shape))

    def write(self, file, dtype: torch.dtype) -> None:
        """Append the elements in order as `dtype`, at most SLAB bytes (or one row) at a time."""
        rows = max(1, SLAB // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for part in self.parts:
            _write_rows(file, part(), rows, dtype)  # nothing here still holds the last part while the next is read


def _write_rows(file, tensor: torch.Tensor, rows: int, dtype: torch.dtype) -> None:
    for block in tensor.split(rows) if tensor.dim() else (tensor,):
        file.write(block.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())


def read_bytes(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """`shape` elements of a file that was checked to hold them. Raises ValueError if it has shrunk since."""
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device="cpu")
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        view, done = memoryview(raw.numpy()), 0
        while done < len(raw):  # one read returns at most 2 GB
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"{path}: ends at byte {offset + done}, expected {offset + len(raw)}")
            done += count
    return raw.view(dtype).view(shape)


def read_json(path: Path) -> dict:
    """A JSON object from a small file. Raises ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    with open(path, "rb") as file:
        text = file.read(JSON_LIMIT + 1)
    return parse_json(text, path)


def parse_json(text: bytes, path: Path) -> dict:
    if len(text) > JSON_LIMIT:
        raise ValueError(f"{path}: got more than {JSON_LIMIT} bytes of JSON")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a JSON {type(value).__name__}, expected an object")
    return value


def _unique(pairs: list) -> dict:
    if len(values := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def sizes(value, most: int | None = None) -> bool:
    """Whether a JSON value is a list of sizes: integers >= 0, at most `most` of them."""
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value) and len(value) <= (most or 1 << 30)


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a file by name. Raises ValueError unless its header describes every byte of it exactly once."""
    if not path.is_file():
        raise ValueError(f"{path}: missing")
    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or not 2 <= length <= min(total - 8, JSON_LIMIT):
            raise ValueError(f"{path}: got a header of {length} bytes in a file of {total}, not a safetensors file")
        header = parse_json(file.read(length), path)
    base, spans, tensors = 8 + length, [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{path}: {name!r}: got {entry!r:.80}, expected dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise ValueError(f"{path}: {name!r}: got dtype {kind!r:.80}, expected one of {sorted(DTYPES)}")
        if not sizes(shape, MAX_DIMS) or not sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{path}: {name!r}: got shape {shape!r:.80} and data_offsets {offsets!r:.80}")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
            raise ValueError(f"{path}: {name!r}: shape {shape!r:.80} of {kind} doesn't fill bytes {offsets!r:.80}")
        spans.append(offsets)
        tensors[name] = _stored(path, base + offsets[0], DTYPES[kind], tuple(shape))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{path}: tensors overlap or leave a hole at byte {min(start, end)} of the data")
        end = stop
    if base + end != total:
        raise ValueError(f"{path}: got {total} bytes, expected {base + end} by its header (truncated?)")
    return tensors


def _stored(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Lazy:
    return Lazy(shape, dtype, (lambda: read_bytes(path, offset, dtype, shape),))


def write_safetensors(path: Path, tensors: dict[str, Lazy], dtype: torch.dtype | None = None) -> int:
    """Write and fsync a file, floating tensors as `dtype` if given; returns its size in bytes."""
    kinds = {name: dtype if dtype and t.dtype.is_floating_point else t.dtype for name, t in tensors.items()}
    # Wide elements first: every tensor is then aligned to its element's size.
    order = sorted(tensors, key=lambda name: -kinds[name].itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        start, end = end, end + math.prod(tensors[name].shape) * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensors[name].write(file, kinds[name])
        if file.tell() != 8 + len(text) + end:
            raise ValueError(f"{path}: wrote {file.tell()} bytes, expected {8 + len(text) + end}")
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end

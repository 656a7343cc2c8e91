"""OpenAI's checkpoints, TensorFlow 1's "tensor bundles", read without TensorFlow.

`PREFIX.index` is a LevelDB table: blocks of prefix-compressed keys in ascending order, each block followed by its
compression type and masked CRC-32C; a last block indexes them, and a footer of 48 bytes points at that. Key "" holds a
BundleHeaderProto, every other key is a tensor's name with a BundleEntryProto: dtype, shape, shard, offset, size and
masked CRC-32C of its bytes in `PREFIX.data-00007-of-00032`.

Everything is checked against the files' sizes before it is allocated; every fault is a ValueError naming the file.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange

from igpt.config import Config
from igpt.convert.crc32c import crc32c, masked
from igpt.convert.tensors import MAX_DIMS, Lazy, read_bytes

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
COMPRESSIONS = {0: "none", 1: "snappy"}
# BundleEntryProto's DataType, of the tensors that a model can hold.
DTYPES = {1: torch.float32, 2: torch.float64, 19: torch.float16, 14: torch.bfloat16}
# A table of iGPT-XL with Adam's slots has 1,500 tensors in 0.1 MB.
MAX_TABLE, MAX_ENTRIES, MAX_KEY = 4 << 20, 1 << 14, 512
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types

# OpenAI's names in a block, their shapes, and what makes our (out, in) of them.
ATTENTION = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Entry:
    """Where a tensor's bytes are. dtype is TensorFlow's number: one that no model holds is no fault until read."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


def is_bundle(path: Path) -> bool:
    """Whether `path` is a checkpoint's prefix, or its .index file."""
    return _index(path).is_file()


def _index(path: Path) -> Path:
    return path if path.suffix == ".index" else path.with_name(path.name + ".index")


def read(path: Path) -> tuple[Config, dict[str, Lazy]]:
    """(config, tensors by our names) of an OpenAI Image GPT: AR, or BERT if it has no start vector.

    Tensors outside of `model/` and optimiser slots are left alone. Raises ValueError."""
    index = _index(path)
    bundle = read_bundle(index)
    found = {name.removeprefix("model/"): tensor for name, tensor in bundle.items() if name.startswith("model/")}
    try:
        return _from_tf(found)
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error


def _from_tf(found: dict[str, Lazy]) -> tuple[Config, dict[str, Lazy]]:
    def take(name: str, dims: int) -> Lazy:
        if name not in found:
            raise ValueError(f"model/{name}: missing, so this is no Image GPT")
        if len(found[name].shape) != dims:
            raise ValueError(f"model/{name}: got shape {found[name].shape}, expected {dims} dimensions")
        taken.add(name)
        return found[name]

    taken: set[str] = set()
    wte, wpe = take("wte", 2), take("wpe", 2)
    heads, head_dim, d = take("h0/attn/q_proj", 3).shape
    if heads * head_dim != d:
        raise ValueError(f"model/h0/attn/q_proj: got shape {(heads, head_dim, d)}, expected (heads, d / heads, d)")
    ours = {"wte": wte, "wpe": wpe, "norm_f": take("ln_f/g", 1), "head": take("wtet", 2)}
    if "sos" in found:
        ours["sos"] = take("sos", 1)
    for name in ("clf/wclf", "wclf"):
        if name in found:
            ours["classifier"] = take(name, 2)
    n_layer = 0
    while f"h{n_layer}/ln_1/g" in found:
        theirs, block = f"h{n_layer}", f"blocks.{n_layer}"
        matrices = {name: take(f"{theirs}/attn/{name}", 3) for name in (*ATTENTION, "c_proj")}
        for name, matrix in matrices.items():
            if matrix.shape != (heads, head_dim, d):
                raise ValueError(f"model/{theirs}/attn/{name}: got {matrix.shape}, expected {(heads, head_dim, d)}")
        ours |= {
            f"{block}.attn.norm": take(f"{theirs}/ln_1/g", 1),
            f"{block}.attn.qkv": Lazy.stack(*(heads_first(matrices[name]) for name in ATTENTION)),
            f"{block}.attn.proj": heads_first(matrices["c_proj"]).t(),
            f"{block}.mlp.norm": take(f"{theirs}/ln_2/g", 1),
            f"{block}.mlp.fc": take(f"{theirs}/mlp/c_fc/w", 2).t(),
            f"{block}.mlp.proj": take(f"{theirs}/mlp/c_proj/w", 2).t(),
        }
        n_layer += 1
    # An optimiser's slot is named behind its variable.
    slots = {name for name in found if name.rpartition("/")[0] in taken}
    if unknown := sorted(found.keys() - taken - slots):
        raise ValueError(f"got {len(unknown)} tensors unknown to Image GPT: {[f'model/{n}' for n in unknown[:5]]}")
    inner = ours["blocks.0.mlp.fc"].shape[0]
    config = Config(
        n_layer=n_layer, width=d, heads=heads, n_ctx=wpe.shape[0], vocab=wte.shape[0],
        objective="ar" if "sos" in ours else "bert", n_inner=None if inner == 4 * d else inner,
        classes=ours["classifier"].shape[0] if "classifier" in ours else 0,
    )  # fmt: skip
    return config, ours


def heads_first(matrix: Lazy) -> Lazy:
    """(heads, d / heads, d) -> (d, d), rows head after head."""
    heads, head_dim, d = matrix.shape
    return matrix.view((heads * head_dim, d), lambda x: rearrange(x, "h e d -> (h e) d"))


def read_bundle(index: Path) -> dict[str, Lazy]:
    """The tensors of a bundle by name. Those of a dtype that no model holds are left out. Raises ValueError."""
    try:
        table = read_table(index)
        if "" not in table:
            raise ValueError("no header")
        shards = _header(table.pop(""))
        entries = [_entry(name, value, shards) for name, value in table.items()]
        return _placed(index, entries, shards)
    except ValueError as error:
        raise ValueError(error if str(index.parent) in str(error) else f"{index}: {error}") from error


def _placed(index: Path, entries: list[Entry], shards: int) -> dict[str, Lazy]:
    """Every tensor's place, once it is known to lie in its shard and apart from the others."""
    tensors, sizes, ends = {}, {}, {}
    for e in sorted(entries, key=lambda e: (e.shard, e.offset)):
        path = index.with_suffix(f".data-{e.shard:05d}-of-{shards:05d}")
        if path not in sizes:
            if not path.is_file():
                raise ValueError(f"{path}: missing")
            sizes[path] = path.stat().st_size
        if e.size < 0 or e.offset < ends.get(path, 0) or e.offset + e.size > sizes[path]:
            raise ValueError(
                f"{path}: {e.name!r} has bytes {e.offset} to {e.offset + e.size}, which overlap another tensor's "
                f"or leave the file of {sizes[path]} bytes (truncated?)"
            )
        ends[path] = e.offset + e.size
        if (dtype := DTYPES.get(e.dtype)) is None:
            continue
        if e.sliced:
            raise ValueError(f"{e.name!r} is stored in slices (a partitioned variable), expected a whole tensor")
        if math.prod(e.shape) * dtype.itemsize != e.size:
            raise ValueError(f"{e.name!r}: {e.size} bytes, but shape {e.shape} of {dtype} has another size")
        tensors[e.name] = Lazy(e.shape, dtype, (_reader(path, e, dtype),))
    return tensors


def _reader(path: Path, e: Entry, dtype: torch.dtype):
    def read_checked() -> torch.Tensor:
        tensor = read_bytes(path, e.offset, dtype, e.shape)
        if e.size and masked(crc32c(tensor.view(-1).view(torch.uint8).numpy())) != e.crc:
            raise ValueError(f"{path}: {e.name!r}: bytes {e.offset} to {e.offset + e.size} don't have their checksum")
        return tensor

    return read_checked


def read_table(index: Path) -> dict[str, bytes]:
    """The keys and values of a table file. Raises ValueError."""
    if not index.is_file():
        raise ValueError("missing")
    with open(index, "rb") as file:
        data = memoryview(file.read(MAX_TABLE + 1))
    if not FOOTER <= len(data) <= MAX_TABLE:
        raise ValueError(f"got {len(data)} bytes, expected {FOOTER} to {MAX_TABLE}")
    footer = data[-FOOTER:]
    if int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("no table's magic number at its end (truncated, or not a TensorFlow .index file)")
    place = _handle(footer, _handle(footer, 0)[1])[0]  # behind that of an unused block of metadata
    table: dict[str, bytes] = {}
    last = b""
    for _, value in _block(data, place):
        for key, entry in _block(data, _handle(value, 0)[0]):
            if (table and key <= last) or len(table) >= MAX_ENTRIES:
                raise ValueError(f"key {key[:80]!r} out of order, or more than {MAX_ENTRIES} of them")
            try:
                table[key.decode()] = bytes(entry)
            except UnicodeDecodeError as error:
                raise ValueError(f"key {key[:80]!r} is no name") from error
            last = key
    return table


def _handle(data: memoryview, at: int) -> tuple[tuple[int, int], int]:
    """((offset, size) of a block, where the next thing is)."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: memoryview, place: tuple[int, int]):
    """Yield (key, value) of the block at (offset, size)."""
    offset, size = place
    if size < 4 or offset + size + 5 > len(data) - FOOTER:
        raise ValueError(f"a block at byte {offset} of {size} bytes leaves the table")
    stored = data[offset : offset + size + 1]
    if masked(crc32c(stored)) != int.from_bytes(data[offset + size + 1 : offset + size + 5], "little"):
        raise ValueError(f"the block at byte {offset} doesn't have its checksum")
    if stored[-1] != 0:
        raise ValueError(f"the block at byte {offset} is compressed ({COMPRESSIONS.get(stored[-1], stored[-1])}), "
                         "expected none")  # fmt: skip
    restarts = int.from_bytes(data[offset + size - 4 : offset + size], "little")
    end = size - 4 - 4 * restarts
    if end < 0:
        raise ValueError(f"the block at byte {offset} has {restarts} restarts in {size} bytes")
    body, at, key = stored[:end], 0, b""
    while at < end:
        shared, at = _varint(body, at)
        fresh, at = _varint(body, at)
        length, at = _varint(body, at)
        if shared > len(key) or shared + fresh > MAX_KEY or at + fresh + length > end:
            raise ValueError(f"the block at byte {offset} has an entry that leaves it, or a key over {MAX_KEY} bytes")
        key = key[:shared] + bytes(body[at : at + fresh])
        at += fresh + length
        yield key, body[at - length : at]


def _header(value: bytes) -> int:
    """The number of shards, from a BundleHeaderProto."""
    shards = 0
    for number, kind, field in _fields(value):
        if (number, kind) == (1, VARINT):
            shards = field
        elif (number, kind) == (2, VARINT) and field != 0:
            raise ValueError("big-endian, expected little-endian")
    if not 1 <= shards <= 99999:
        raise ValueError(f"got {shards} shards")
    return shards


def _entry(name: str, value: bytes, shards: int) -> Entry:
    """From a BundleEntryProto; fields that are zero may be absent."""
    integers, shape, crc, sliced = {}, (), 0, False
    for number, kind, field in _fields(value):
        if kind == VARINT:
            integers[number] = field - (1 << 64) if field >= 1 << 63 else field
        elif (number, kind) == (2, BYTES):
            shape = _shape(name, field)
        elif (number, kind) == (6, FIXED32):
            crc = field
        elif (number, kind) == (7, BYTES):
            sliced = True
    dtype, shard, offset, size = (integers.get(number, 0) for number in (1, 3, 4, 5))
    if not 0 <= shard < shards:
        raise ValueError(f"{name!r}: got shard {shard}, expected one of {shards}")
    return Entry(name, dtype, shape, shard, offset, size, crc, sliced)


def _shape(name: str, value: memoryview) -> tuple[int, ...]:
    """From a TensorShapeProto."""
    shape = []
    for number, kind, field in _fields(value):
        if (number, kind) == (2, BYTES):
            size = sum(f for n, k, f in _fields(field) if (n, k) == (1, VARINT))
            shape.append(size)
        if len(shape) > MAX_DIMS or any(size >= 1 << 63 for size in shape) or (number == 3 and field):
            raise ValueError(f"{name!r}: got an unknown, negative or long shape {tuple(shape)}")
    return tuple(shape)


def _fields(data):
    """Yield (number, wire type, value) of a protobuf message: integers, or bytes as a view."""
    data, at = memoryview(data), 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            width = 4 if kind == FIXED32 else 8
            if at + width > len(data):
                raise ValueError("a protobuf message ends in the middle of a number")
            (value,) = struct.unpack_from("<I" if kind == FIXED32 else "<Q", data, at)
            at += width
        elif kind == BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a protobuf message ends in the middle of a field")
            value = data[at : at + length]
            at += length
        else:
            raise ValueError(f"a protobuf message has wire type {kind}")
        yield tag >> 3, kind, value


def _varint(data, at: int) -> tuple[int, int]:
    """(value, where the next thing is): 7 bits a byte, the lowest first, at most 64."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError("a number leaves its message")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >= 1 << 64:
                break
            return value, at + i + 1
    raise ValueError("a number has more than 64 bits")

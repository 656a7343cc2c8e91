"""TensorFlow's tensor bundles written from the format's description: a second opinion for igpt/tf_checkpoint.py.

Shares nothing with the reader: the checksum here goes bit by bit, the messages are built field by field. Checked once
against TensorFlow 2.21's own reader (test_tensorflow_reads_the_writers_files does it again wherever that is installed).
"""

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


@lru_cache(1)
def crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def masked_crc(data: bytes) -> int:
    table, crc = crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % 2**64) if value else b""


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def entry(dtype: int, shape, shard: int, offset: int, size: int, crc: int, extra: bytes = b"") -> bytes:
    dims = b"".join(message(2, number(1, n)) for n in shape)
    place = number(3, shard) + number(4, offset) + number(5, size)
    return number(1, dtype) + message(2, dims) + place + varint(6 << 3 | 5) + struct.pack("<I", crc) + extra


def header(shards: int, endianness: int = 0) -> bytes:
    return number(1, shards) + number(2, endianness) + message(3, number(1, 1))


def block(items, restart_every: int = 16) -> bytes:
    """Entries with their keys' shared prefixes left out, but at every restart."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % restart_every:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def sealed(contents: bytes, compression: int = 0) -> bytes:
    contents += bytes([compression])
    return contents + struct.pack("<I", masked_crc(contents))


def table(items: list[tuple[bytes, bytes]], per_block: int = 5, compression: int = 0) -> bytes:
    out, index = b"", []
    for i in range(0, len(items), per_block):
        data = block(items[i : i + per_block])
        # Any key that is not below the block's last one and below the next block's first one may stand for a block.
        index.append((items[i : i + per_block][-1][0], varint(len(out)) + varint(len(data))))
        out += sealed(data, compression)
    handles = b""
    for data in (block([]), block(index, restart_every=1)):
        handles += varint(len(out)) + varint(len(data))
        out += sealed(data)
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_bundle(prefix: Path, tensors: dict[str, np.ndarray], shards: int = 3, **options) -> None:
    """PREFIX.index and PREFIX.data-*: the tensors go round the shards in order of their names."""
    data, items = [b""] * shards, [(b"", header(shards))]
    for i, name in enumerate(sorted(tensors)):
        raw = np.ascontiguousarray(tensors[name]).tobytes()
        place, shape, dtype = i % shards, tensors[name].shape, DTYPES[str(tensors[name].dtype)]
        items.append((name.encode(), entry(dtype, shape, place, len(data[place]), len(raw), masked_crc(raw))))
        data[place] += raw
    for i, raw in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}").write_bytes(raw)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(items, **options))


def openai_model(n_layer=2, heads=2, head_dim=4, n_ctx=6, vocab=5, *, bert=False, extra=False, seed=0) -> dict:
    """Random weights by OpenAI's names."""
    rng, d = np.random.default_rng(seed), heads * head_dim
    shapes = {"wpe": (n_ctx, d), "wte": (vocab, d), "wtet": (vocab, d), "ln_f/g": (d,)}
    shapes |= {} if bert else {"sos": (d,)}
    for i in range(n_layer):
        shapes |= {f"h{i}/ln_{j}/g": (d,) for j in (1, 2)}
        shapes |= {f"h{i}/attn/{p}_proj": (heads, head_dim, d) for p in "qkvc"}
        shapes |= {f"h{i}/mlp/c_fc/w": (d, 4 * d), f"h{i}/mlp/c_proj/w": (4 * d, d)}
    tensors = {f"model/{name}": (rng.standard_normal(s) * d**-0.5).astype(np.float32) for name, s in shapes.items()}
    if extra:
        tensors |= {f"{name}/Adam": np.zeros_like(value) for name, value in tensors.items()}
        tensors |= {"global_step": np.array(7), "beta1_power": np.array(0.9, np.float32)}
    return tensors

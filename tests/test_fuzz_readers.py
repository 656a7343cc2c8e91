"""Mutated checkpoint files: every one loads or gives one ValueError, quickly, in the file's size plus 64 MiB.

IGPT_FUZZ files in all (default 300; `make fuzz` runs 5,000). Mutations are of bytes (flips, cuts, insertions, copies
of other parts, extreme integers) and, because checksums would catch most of those in a TensorFlow index, of its blocks'
and messages' contents with checksums made right again.
"""

import copy
import json
import os
import resource
import shutil
import signal
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tf_writer
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import igpt
from igpt.convert import checkpoints

FILES = int(os.environ.get("IGPT_FUZZ", "300"))
ALLOWANCE = 64 << 20
SECONDS = 20
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="bounds memory as Linux does")
CONFIG = igpt.Config(n_layer=1, width=8, heads=2, n_ctx=4, vocab=5)
EXTREMES = [
    b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x7f", struct.pack("<Q", 1 << 40), struct.pack("<I", 1 << 31),
    b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"-1", b"null", b"NaN", b'"\\ud800"', b"../", b"\0",
]  # fmt: skip
VALUES = [
    -1, 0, 1, 2, 1 << 31, 1 << 63, 1 << 70, 10**300, 0.5, 1e308, float("nan"), None, True, False, "", "F64", "../x",
    "a\0b", "x" * 5000, [], {}, [1 << 62, 1 << 62], [[[[]]]], {"a": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Directories by kind, each a checkpoint that loads."""
    root = tmp_path_factory.mktemp("good")
    model = igpt.ImageGPT(CONFIG)
    model.palette = igpt.Palette(np.linspace(-1, 1, 15).reshape(5, 3))
    model.save_pretrained(root / "igpt")
    model.save_pretrained(root / "hf", format="hf")
    shutil.copytree(root / "hf", root / "shards")
    (root / "shards" / "model.safetensors").rename(root / "shards" / "a.safetensors")
    names = checkpoints.read_safetensors(root / "shards" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors")}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "tf").mkdir()
    tensors = tf_writer.openai_model(1, 2, 4, 4, 5, extra=True)
    tf_writer.write_bundle(root / "tf" / "c", tensors, shards=2, per_block=9)
    model.palette.save(root / "tf" / "kmeans_centers.npy")
    for directory in root.iterdir():
        assert igpt.ImageGPT.from_pretrained(directory).palette == model.palette
    return root


@contextmanager
def bounded(extra: int):
    """MemoryError for any allocation that takes the process `extra` bytes above what it has, and an alarm."""

    def late(*_):
        raise TimeoutError(f"not done in {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@st.composite
def mutations(draw):
    """A list of (kind, where as a fraction, how long, which byte, which of EXTREMES)."""
    one = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "copy", "extreme", "truncate", "repeat"]),
        st.floats(0, 1), st.floats(0, 1), st.integers(1, 64), st.integers(0, 255),
        st.integers(0, len(EXTREMES) - 1),
    )  # fmt: skip
    return draw(st.lists(one, min_size=1, max_size=4))


def mutate(raw: bytes, changes) -> bytes:
    for kind, where, other, length, byte, extreme in changes:
        at, source = int(where * len(raw)), int(other * len(raw))
        match kind:
            case "flip":
                raw = raw[:at] + bytes(b ^ (byte or 1) for b in raw[at : at + 1]) + raw[at + 1 :]
            case "cut":
                raw = raw[:at] + raw[at + length :]
            case "insert":
                raw = raw[:at] + bytes([byte]) * length + raw[at:]
            case "copy":
                raw = raw[:at] + raw[source : source + length] + raw[at + length :]
            case "extreme":
                put = EXTREMES[extreme]
                raw = raw[:at] + put + raw[at + len(put) * (byte % 2) :]
            case "truncate":
                raw = raw[:at]
            case "repeat":
                raw = raw[:at] + raw[at : at + length] * (byte + 1) + raw[at:]
    return raw


def mutate_header(raw: bytes, changes) -> bytes:
    """A safetensors file whose header is mutated and its length right again."""
    length = struct.unpack("<Q", raw[:8])[0]
    header = mutate(raw[8 : 8 + length], changes)
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def mutate_values(raw: bytes, changes) -> bytes:
    """A JSON object with values replaced, or taken out, anywhere in it; or the header of a safetensors file."""
    if raw[:1] != b"{":
        length = struct.unpack("<Q", raw[:8])[0]
        header = mutate_values(raw[8 : 8 + length].strip(), changes)
        return struct.pack("<Q", len(header)) + header + raw[8 + length :]
    tree = json.loads(raw)
    for kind, where, other, _, byte, _ in changes:
        at, depth = tree, 0
        while depth < 4:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[int(where * 997 + depth * byte) % len(keys)]
            if isinstance(at[key], (dict, list)) and at[key] and byte % 3:
                at, depth = at[key], depth + 1
                continue
            if kind == "cut":
                del at[key]
            else:
                at[key] = copy.deepcopy(VALUES[int(other * 991) % len(VALUES)])
            break
    return json.dumps(tree).encode()


def mutate_table(raw: bytes, changes, values: bool) -> bytes:
    """A table whose contents are mutated and whose checksums hold: one value, or a block as a whole."""
    (_, _), at = handle(raw, len(raw) - 48)
    (start, size), _ = handle(raw, at)
    items = []
    for _, place in entries(raw[start : start + size]):
        (offset, length), _ = handle(place, 0)
        items += entries(raw[offset : offset + length])
    victim = changes[0][3] % len(items)
    if values:
        items[victim] = (items[victim][0], mutate(items[victim][1], changes))
        return tf_writer.table(items)
    block = mutate(tf_writer.block(items), changes)
    index = tf_writer.block([(items[-1][0], tf_writer.varint(0) + tf_writer.varint(len(block)))])
    sealed = tf_writer.sealed(block) + tf_writer.sealed(index)
    handles = bytes(2) + tf_writer.varint(len(block) + 5) + tf_writer.varint(len(index))
    return sealed + handles.ljust(40, b"\0") + raw[-8:]


def handle(data: bytes, at: int):
    values = []
    for _ in range(2):
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            shift, at = shift + 7, at + 1
            if byte < 128:
                break
        values.append(value)
    return tuple(values), at


def entries(block: bytes) -> list:
    at, key, out = 0, b"", []
    end = len(block) - 4 - 4 * struct.unpack("<I", block[-4:])[0]
    while at < end:
        (shared, fresh), at = handle(block, at)
        length = handle(block + b"\0", at)[0][0]
        at += len(tf_writer.varint(length))
        key, at = key[:shared] + block[at : at + fresh], at + fresh
        out.append((key, block[at : at + length]))
        at += length
    return out


def mutate_entry(raw: bytes, changes) -> bytes:
    return mutate_table(raw, changes, values=True)


def mutate_block(raw: bytes, changes) -> bytes:
    return mutate_table(raw, changes, values=False)


TARGETS = [
    ("igpt", "model.safetensors", mutate), ("igpt", "model.safetensors", mutate_header),
    ("igpt", "model.safetensors", mutate_values), ("igpt", "config.json", mutate),
    ("igpt", "config.json", mutate_values), ("igpt", "palette.npy", mutate),
    ("hf", "model.safetensors", mutate_header), ("hf", "model.safetensors", mutate_values),
    ("hf", "config.json", mutate), ("hf", "config.json", mutate_values), ("hf", "preprocessor_config.json", mutate),
    ("hf", "preprocessor_config.json", mutate_values), ("shards", "model.safetensors.index.json", mutate),
    ("shards", "model.safetensors.index.json", mutate_values), ("shards", "a.safetensors", mutate_values),
    ("tf", "c.index", mutate), ("tf", "c.index", mutate_entry), ("tf", "c.index", mutate_block),
    ("tf", "c.data-00001-of-00002", mutate), ("tf", "kmeans_centers.npy", mutate),
]  # fmt: skip


@LINUX
def test_the_bounds_hold():
    with pytest.raises((MemoryError, RuntimeError)), bounded(ALLOWANCE):
        torch.empty(2 * ALLOWANCE, dtype=torch.uint8)
    with pytest.raises(MemoryError), bounded(ALLOWANCE):
        bytearray(2 * ALLOWANCE)


@LINUX
def test_mutated_files(good, tmp_path, record_property):
    counts = {"files": 0, "loaded": 0, "refused": 0}
    torch.zeros(1) @ torch.zeros(1, 1)  # thread pools take their address space now

    @settings(
        max_examples=FILES, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize="IGPT_FUZZ" not in os.environ,
    )  # fmt: skip
    @given(st.sampled_from(TARGETS), mutations())
    def run(target, changes):
        kind, name, how = target
        directory = tmp_path / "case"
        raw = how((good / kind / name).read_bytes(), changes)
        shutil.copytree(good / kind, directory)
        (directory / name).write_bytes(raw)
        before = sorted(os.listdir(tmp_path))
        counts["files"] += 1
        try:
            with bounded(sum(p.stat().st_size for p in directory.iterdir()) + ALLOWANCE), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = igpt.ImageGPT.from_pretrained(directory)
            counts["loaded"] += 1
            assert checkpoints.shapes(model.config) == {n: tuple(p.shape) for n, p in model.named_parameters()}
        except ValueError as error:
            counts["refused"] += 1
            assert str(directory) in str(error)
        finally:
            assert sorted(os.listdir(tmp_path)) == before
            shutil.rmtree(directory)

    run()
    record_property("count", f"{counts['files']} mutated files: {counts['loaded']} loaded, {counts['refused']} refused")
    assert counts["files"] >= FILES and counts["refused"] > counts["files"] // 4
    assert counts["loaded"] > 0

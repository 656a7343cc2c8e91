"""OpenAI's checkpoints: TensorFlow's own files, files by the format's description, and their maths restated."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tf_writer as w
import torch

import igpt
from igpt import convert
from igpt.convert import tf_checkpoint
from igpt.convert.crc32c import BLOCK, crc32c, masked

GENUINE = Path(__file__).parent / "data" / "tf"


def openai_logits(tensors: dict, x: np.ndarray, heads: int) -> np.ndarray:
    """SPEC section 7's einsums and sections 0 and 1's maths in numpy fp64, from the names in the file."""
    p = {name.removeprefix("model/"): np.float64(value) for name, value in tensors.items()}

    def norm(h, g):
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * g

    h, n = p["wte"][x], x.shape[1]
    if "sos" in p:
        h = np.concatenate([np.broadcast_to(p["sos"], (len(x), 1, h.shape[-1])), h[:, :-1]], 1)
    h = h + p["wpe"][:n]
    i = 0
    while f"h{i}/ln_1/g" in p:
        y = norm(h, p[f"h{i}/ln_1/g"])
        q, k, v = (np.einsum("bsf,hef->bhse", y, p[f"h{i}/attn/{c}_proj"]) for c in "qkv")
        s = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(q.shape[-1])
        if "sos" in p:
            s = np.where(np.tril(np.ones((n, n))) > 0, s, -np.inf)
        s = np.exp(s - s.max(-1, keepdims=True))
        a = np.einsum("bhst,bhte->bhse", s / s.sum(-1, keepdims=True), v)
        h = h + np.einsum("bhse,hef->bsf", a, p[f"h{i}/attn/c_proj"])
        y = norm(h, p[f"h{i}/ln_2/g"]) @ p[f"h{i}/mlp/c_fc/w"]
        h = h + y / (1 + np.exp(-1.702 * y)) @ p[f"h{i}/mlp/c_proj/w"]
        i += 1
    return norm(h, p["ln_f/g"]) @ p["wtet"].T


def test_tensorflows_own_file():
    values = dict(np.load(GENUINE / "values.npz"))
    bundle = tf_checkpoint.read_bundle(GENUINE / "model.ckpt-1.index")
    assert {"beta1_power", "model/wte/Adam"} < bundle.keys()
    assert all(np.array_equal(bundle[name].read().numpy(), value) for name, value in values.items())
    x = np.array([[0, 1, 2, 3], [3, 3, 0, 1]])
    for source in (GENUINE, GENUINE / "model.ckpt-1", GENUINE / "model.ckpt-1.index"):
        model = igpt.ImageGPT.from_pretrained(source, dtype=torch.float64)
        want = openai_logits({n: v for n, v in values.items() if "Adam" not in n}, x, 2)
        assert np.abs(model(torch.from_numpy(x)).detach().numpy() - want).max() < 1e-12


@pytest.mark.parametrize("bert", [False, True], ids=["ar", "bert"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 5])
def test_logits_are_openais(head_dim, bert, tmp_path):
    tensors = w.openai_model(head_dim=head_dim, bert=bert, extra=head_dim == 5)
    w.write_bundle(tmp_path / "model.ckpt-1000000", tensors, shards=32)
    model = igpt.ImageGPT.from_pretrained(tmp_path / "model.ckpt-1000000", dtype=torch.float64)
    assert model.config.objective == ("bert" if bert else "ar")
    x = np.random.default_rng(1).integers(0, 5, (2, 6))
    want = openai_logits({n: v for n, v in tensors.items() if n.startswith("model/") and "Adam" not in n}, x, 2)
    assert np.abs(model(torch.from_numpy(x)).detach().numpy() - want).max() < 1e-10


@pytest.mark.parametrize("head_dim", [64, 96, 128, 5])
def test_through_every_format_bit_for_bit(head_dim, tmp_path):
    w.write_bundle(tmp_path / "tf", w.openai_model(head_dim=head_dim))
    want = igpt.ImageGPT.from_pretrained(tmp_path / "tf")
    convert.convert(tmp_path / "tf", tmp_path / "hf", "hf")
    convert.convert(tmp_path / "hf", tmp_path / "ours", "igpt")
    convert.convert(tmp_path / "ours", tmp_path / "hf2", "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "hf2" / "model.safetensors").read_bytes()
    for path in ("hf", "ours"):
        model = igpt.ImageGPT.from_pretrained(tmp_path / path)
        assert model.config == want.config
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters()))


def test_dtypes_classifier_and_palette(tmp_path):
    tensors = {name: value.astype(np.float16) for name, value in w.openai_model().items()}
    tensors["model/clf/wclf"] = np.ones((3, 8), np.float16)
    w.write_bundle(tmp_path / "c", tensors)
    centres = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
    np.save(tmp_path / "kmeans_centers.npy", centres)
    model = igpt.ImageGPT.from_pretrained(tmp_path / "c")
    assert model.wte.dtype == torch.float16 and model.config.classes == 3
    assert model.palette == igpt.Palette(centres)


def test_crc32c():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    rng = np.random.default_rng(0)
    for size in (1, 3, 127, 128, 129, 5000, BLOCK + 77):
        data = rng.bytes(size)
        assert masked(crc32c(data)) == w.masked_crc(data)


def test_tensorflow_reads_the_writers_files(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tensors = w.openai_model(extra=True)
    w.write_bundle(tmp_path / "c", tensors, shards=4)
    reader = tf.train.load_checkpoint(str(tmp_path / "c"))
    assert reader.get_variable_to_shape_map().keys() == tensors.keys()
    assert all(np.array_equal(reader.get_tensor(name), value) for name, value in tensors.items())


# --- strangers' files


def put(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data) if at >= 0 else None] = data
    path.write_bytes(raw)


@pytest.fixture
def ckpt(tmp_path):
    w.write_bundle(tmp_path / "c", w.openai_model())
    return tmp_path / "c"


def table_of(entries: dict[str, bytes], shards: int = 1, **options) -> bytes:
    return w.table([(b"", w.header(shards)), *((k.encode(), v) for k, v in sorted(entries.items()))], **options)


def one(shape=(2,), shard=0, offset=0, size=8, dtype=1, extra=b""):
    return {"a": w.entry(dtype, shape, shard, offset, size, w.masked_crc(bytes(8)), extra)}


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "expected 48"),
        (bytes(100), "magic number"),
        (table_of(one(), compression=1), "snappy"),
        (table_of(one(), compression=7), "compressed"),
        (table_of(one(extra=w.message(7, b""))), "slices"),
        (table_of(one(shape=(3,))), "another size"),
        (table_of(one(shape=(1 << 62, 1 << 62))), "another size"),
        (table_of(one(shape=(-2, -1))), "negative"),
        (table_of(one(shape=(1,) * 9)), "long shape"),
        (table_of(one(offset=4)), "leave the file"),
        (table_of(one(offset=-8)), "overlap"),
        (table_of(one(size=-8)), "leave the file"),
        (table_of(one(offset=1 << 62)), "leave the file"),
        (table_of(one() | {"b": one()["a"]}), "overlap"),
        (table_of(one(shard=1)), "shard 1"),
        (table_of(one(shard=1), shards=2), "data-00001-of-00002: missing"),
        (table_of({}, shards=0), "0 shards"),
        (table_of({}, shards=-1), "shards"),
        (w.table([(b"a", one()["a"])]), "no header"),
        (w.table([(b"", w.header(1, endianness=1))]), "big-endian"),
        (w.table([(b"", w.header(1)), (b"b", b""), (b"a", b"")]), "out of order"),
        (w.table([(b"", w.header(1)), (b"\xff", b"")]), "is no name"),
        (w.table([(b"", w.header(1)), (b"k" * 600, b"")]), "a key over"),
        (w.table([(b"", w.header(1)), (b"a", b"\x0b")]), "wire type 3"),
        (w.table([(b"", w.header(1)), (b"a", b"\x08")]), "leaves its message"),
        (w.table([(b"", w.header(1)), (b"a", b"\x08" + b"\xff" * 10)]), "more than 64 bits"),
        (w.table([(b"", w.header(1)), (b"a", b"\x12\x7f")]), "middle of a field"),
        (w.table([(b"", w.header(1)), (b"a", b"\x35\x00")]), "middle of a number"),
        (bytes(4 << 20) + table_of(one()), "expected 48"),
    ],
)
def test_hostile_tables(data, message, tmp_path):
    (tmp_path / "c.index").write_bytes(data)
    (tmp_path / "c.data-00000-of-00001").write_bytes(bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        tf_checkpoint.read_bundle(tmp_path / "c.index")
    assert str(tmp_path) in str(caught.value)


def test_the_table_of_these_tests_is_good(tmp_path):
    (tmp_path / "c.index").write_bytes(table_of(one()))
    (tmp_path / "c.data-00000-of-00001").write_bytes(bytes(8))
    assert torch.equal(tf_checkpoint.read_bundle(tmp_path / "c.index")["a"].read(), torch.zeros(2))


def test_flipped_bits_truncated_and_missing_shards(ckpt):
    shard = ckpt.with_name("c.data-00001-of-00003")
    whole = shard.read_bytes()
    put(shard, 40, bytes([whole[40] ^ 1]))
    with pytest.raises(ValueError, match="checksum"):
        igpt.ImageGPT.from_pretrained(ckpt)
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated"):
        igpt.ImageGPT.from_pretrained(ckpt)
    shard.unlink()
    with pytest.raises(ValueError, match="missing"):
        igpt.ImageGPT.from_pretrained(ckpt)
    put(ckpt.with_name("c.index"), 30, b"\x55\x55")
    with pytest.raises(ValueError, match="checksum"):
        igpt.ImageGPT.from_pretrained(ckpt)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model/wte": None}, "model/wte: missing"),
        ({"model/h1/mlp/c_fc/w": None}, "h1/mlp/c_fc/w: missing"),
        ({"model/unknown": np.zeros(2, np.float32)}, "unknown to Image GPT"),
        ({"model/wte": np.zeros(5, np.float32)}, "expected 2 dimensions"),
        ({"model/wte": np.zeros((5, 9), np.float32)}, "wte: got shape"),
        ({"model/wte": np.zeros((5, 8), np.float64)}, "one floating dtype"),
        ({"model/h0/attn/q_proj": np.zeros((8, 4, 2), np.float32)}, "heads, d / heads, d"),
        ({"model/h1/attn/v_proj": np.zeros((4, 2, 8), np.float32)}, "v_proj"),
        ({"model/h0/attn/k_proj": np.zeros((2, 4, 8), np.float64)}, "don't stack"),
        ({"model/wte": np.zeros((5, 8), np.int32)}, "model/wte: missing"),
    ],
)
def test_bundles_that_are_no_image_gpt(change, message, tmp_path):
    tensors = w.openai_model() | change
    w.write_bundle(tmp_path / "c", {name: value for name, value in tensors.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        igpt.ImageGPT.from_pretrained(tmp_path / "c")


def test_several_checkpoints_in_a_directory(ckpt):
    shutil.copy(ckpt.with_name("c.index"), ckpt.with_name("d.index"))
    with pytest.raises(ValueError, match="several"):
        igpt.ImageGPT.from_pretrained(ckpt.parent)

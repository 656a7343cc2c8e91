"""Palette: exact against the reference, as good as scikit-learn's k-means, and careful about what it is given."""

import copy
import json
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import igpt.data
from igpt import Palette, ops
from igpt.kernels import reference
from igpt.palette.kmeans import Blocks, distinct_colours, kmeans
from tests.test_checkpoint import largest_file


def brute(pixels: np.ndarray, palette: Palette) -> torch.Tensor:
    """The specification, a part at a time."""
    parts = torch.from_numpy(np.ascontiguousarray(pixels)).reshape(-1, 3).split(8192)
    return torch.cat([reference.palette_encode(part, palette.centres) for part in parts])


def palettes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    # Pixel 8 is exactly half-way, and the corner of a block that is the near one's far end and the far one's near end.
    eight = np.float32(8) / np.float32(127.5) - np.float32(1)
    return {
        "block corner": np.array([[eight - 7 / 128] * 3, [eight + 7 / 128] * 3]),
        "uniform": rng.uniform(-1, 1, (512, 3)),
        "tight": np.clip(rng.normal(0, 0.02, (512, 3)), -1, 1),  # many candidates a block
        "grid": grid,  # ties everywhere: pixels half-way between centres
        "on pixels": rng.integers(0, 256, (300, 3)) / 127.5 - 1,
        "duplicates": np.repeat(rng.uniform(-1, 1, (5, 3)), 4, axis=0)[rng.permutation(20)],
        "one": np.zeros((1, 3)),
        "corners": np.array([[-1, -1, -1], [1, 1, 1], [1, -1, 1]]),
    }


@pytest.mark.parametrize("name", palettes())
def test_encode_is_the_reference_bit_for_bit(name):
    palette = Palette(palettes()[name])
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (4 if name == "tight" else 20, 20, 20, 3), dtype=np.uint8)
    edges = np.stack(np.meshgrid(*[[0, 1, 7, 8, 127, 128, 247, 248, 254, 255]] * 3), -1).reshape(1, 10, 100, 3)
    for pixels in (noise, edges.astype(np.uint8), noise):
        tokens = palette.encode(pixels)
        assert tokens.dtype == torch.int64 and tokens.shape == (len(pixels), pixels.shape[1] * pixels.shape[2])
        assert torch.equal(tokens.flatten(), brute(pixels, palette))


def test_encode_real_pictures_and_every_grey():
    emoji = igpt.data.load("builtin:emoji")
    palette = Palette(np.unique(emoji.images.reshape(-1, 3), axis=0)[::500] / 127.5 - 1)
    assert torch.equal(palette.encode(emoji.images[::40]).flatten(), brute(emoji.images[::40], palette))
    greys = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    assert torch.equal(palette.encode(torch.from_numpy(greys)).flatten(), brute(greys, palette))


@settings(deadline=None, max_examples=25)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=1, max_side=40).map(lambda s: (*s, 3)),
               elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.uint8, (1, 3, 5, 3)),
)
def test_encode_any_palette_any_pixels(centres, pixels):
    palette = Palette(centres)
    assert torch.equal(palette.encode(pixels).flatten(), brute(pixels, palette))


def test_encode_takes_strided_tensors_and_empty_batches():
    palette = Palette(palettes()["uniform"])
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8).permute(0, 2, 3, 1)
    assert torch.equal(palette.encode(images), palette.encode(images.contiguous()))
    assert palette.encode(images[:0]).shape == (0, 63)


def test_encode_on_the_gpu_is_the_same(device):
    if device.type != "cuda":
        pytest.skip("no GPU here")
    palette = Palette(palettes()["grid"])
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(palette.encode(images.to(device)).cpu(), palette.encode(images))


def test_encode_agrees_with_hugging_face():
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, "ImageGPTImageProcessorPil", None)
    if processor is None:
        pytest.skip(f"transformers {transformers.__version__} has no ImageGPTImageProcessorPil")
    palette = Palette(palettes()["uniform"])
    images = igpt.data.load("builtin:emoji").images[:8]
    process = processor(clusters=palette.centres.numpy(), do_resize=False)
    theirs = process(list(images), return_tensors="np")["input_ids"]
    ours = palette.encode(images)
    # They expand the square, so a near tie may fall to the other side: then both must be equally near.
    differ = ours.numpy() != theirs
    assert differ.mean() < 1e-3
    x = torch.from_numpy(images).flatten(1, 2).double() / 127.5 - 1
    distance = [(x - palette.centres.double()[torch.as_tensor(t)]).square().sum(-1) for t in (ours, theirs)]
    assert (distance[0] - distance[1]).abs().max() < 1e-5


def test_threads_share_one_table():
    palette = Palette(palettes()["uniform"])
    images = np.random.default_rng(2).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: palette.encode(images)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(tokens.flatten(), brute(images, palette)) for tokens in results.values())


def test_pickles_without_the_table():
    palette = Palette(palettes()["uniform"])
    palette.encode(np.zeros((1, 2, 2, 3), np.uint8))
    assert len(pickle.dumps(palette)) < 10_000
    for twin in (pickle.loads(pickle.dumps(palette)), copy.deepcopy(palette)):
        assert twin == palette and hash(twin) == hash(palette) and "table" not in vars(twin)


def test_decode():
    palette = Palette(palettes()["on pixels"])
    tokens = torch.randint(0, 300, (2, 12))
    images = palette.decode(tokens, (3, 4))
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 4, 3)
    assert torch.equal(images.flatten(0, 2), reference.palette_decode(tokens.flatten(), palette.centres))
    # Colours that lie on pixel values come back unchanged.
    assert torch.equal(palette.decode(palette.encode(images), (3, 4)), images)
    assert torch.equal(palette.decode(tokens.numpy().astype(np.uint16), (3, 4)), images)


def inertia(pixels: np.ndarray, palette: Palette) -> float:
    """Sum of squared distances to the nearest colour, fp64."""
    colours = palette.centres.double()[palette.encode(pixels.reshape(1, 1, -1, 3))[0]]
    return (torch.from_numpy(pixels).double() / 127.5 - 1 - colours).square().sum().item()


@pytest.mark.parametrize("k", [128, 512])
def test_fit_is_as_good_as_scikit_learn(k):
    cluster = pytest.importorskip("sklearn.cluster")
    pixels = igpt.data.load("builtin:emoji").images.reshape(-1, 3)
    pixels = pixels[np.random.RandomState(0).permutation(len(pixels))[:30_000]]
    theirs = cluster.KMeans(k, n_init=1, random_state=0).fit((pixels / 127.5 - 1).astype(np.float32))
    assert inertia(pixels, Palette.fit(pixels, k=k)) <= 1.02 * inertia(pixels, Palette(theirs.cluster_centers_))


def test_fit_is_deterministic():
    images = igpt.data.load("builtin:emoji").images
    first = Palette.fit(images[:50], k=64, seed=3)
    assert Palette.fit(torch.from_numpy(images[:50]), k=64, seed=3) == first
    assert Palette.fit(images[:50], k=64, seed=4) != first
    # The arrangement of the pixels doesn't matter, only how often each colour occurs.
    assert Palette.fit(images[:50].reshape(-1, 3)[::-1], k=64, seed=3) == first


def test_fit_rediscovers_the_colours_there_are():
    rng = np.random.default_rng(0)
    colours = np.unique(rng.integers(0, 256, (40, 3), dtype=np.uint8), axis=0)
    pixels = colours[rng.integers(0, len(colours), (4, 16, 16))]
    palette = Palette.fit(pixels, k=len(colours))
    assert sorted(map(tuple, palette.colours.tolist())) == sorted(map(tuple, colours.tolist()))
    with pytest.raises(ValueError, match=rf"images: got {len(colours)} distinct colours, expected at least k="):
        Palette.fit(pixels, k=len(colours) + 1)


def test_fit_refills_empty_clusters(monkeypatch):
    """A start with the same centre many times leaves empty clusters; they must not stay empty or become NaN."""
    pixels = np.random.default_rng(0).integers(200, 256, (4000, 3), dtype=np.uint8)
    monkeypatch.setattr("igpt.palette.kmeans.plus_plus", lambda x, w, k, rng: np.zeros((k, 3), np.float32))
    palette = Palette.fit(pixels, k=20)
    assert len(torch.unique(palette.encode(pixels.reshape(1, 1, -1, 3)))) == 20


def test_distinct_colours_by_sorting_and_by_histogram(monkeypatch):
    images = igpt.data.load("builtin:emoji").images[:20]
    sorted_ones = distinct_colours(images)
    monkeypatch.setattr("igpt.palette.kmeans.MANY", 5000)
    for a, b in zip(sorted_ones, distinct_colours(images)):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    expected = np.unique(images.reshape(-1, 3), axis=0, return_counts=True)
    assert all(np.array_equal(a, b) for a, b in zip(sorted_ones, expected))


@pytest.mark.parametrize("start", ["", "empty clusters"])
def test_fit_of_tensors_has_the_same_bits(start, device, monkeypatch):
    """The steps that a GPU takes: by the kernel, interpreted where there is none."""
    if start:
        monkeypatch.setattr("igpt.palette.kmeans.plus_plus", lambda x, w, k, rng: np.zeros((k, 3), np.float32))
    by_kernel = ops.palette_sums
    monkeypatch.setattr(ops, "palette_sums", lambda *inputs: by_kernel(*inputs, impl="triton"))
    monkeypatch.setattr("igpt.palette.kmeans.MANY", 5000)
    images = igpt.data.load("builtin:emoji").images[:8]
    for a, b in zip(distinct_colours(images), distinct_colours(torch.from_numpy(images).to(device))):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert np.array_equal(kmeans(images, 24, 0), kmeans(torch.from_numpy(images).to(device), 24, 0))


def test_kmeans_assignment_is_exact():
    colours, weight = distinct_colours(igpt.data.load("builtin:emoji").images[:30])
    assert weight.sum() == 30 * 1024
    palette = Palette(palettes()["uniform"])
    assert np.array_equal(Blocks(colours).nearest(palette.centres.numpy()), brute(colours, palette).numpy())


def test_save_and_load(tmp_path):
    palette = Palette(palettes()["uniform"])
    palette.save(tmp_path / "p.npy")
    assert Palette.load(tmp_path / "p.npy") == palette
    (tmp_path / "openai").mkdir()
    np.save(tmp_path / "openai" / "kmeans_centers.npy", palettes()["uniform"])  # fp64, as any array may be
    assert Palette.load(tmp_path / "openai") == palette
    config = {"clusters": palette.centres.tolist(), "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert Palette.load(tmp_path / "preprocessor_config.json") == palette
    assert Palette.load(tmp_path) == palette


def test_a_full_disk_leaves_the_palette_that_was(tmp_path):
    path, small = tmp_path / "palette.npy", Palette(np.eye(3))
    small.save(path)
    with largest_file(200), pytest.raises(OSError):
        Palette(np.random.default_rng(0).uniform(-1, 1, (512, 3))).save(path)
    assert Palette.load(path) == small


def test_load_names_the_file(tmp_path):
    path = tmp_path / "kmeans_centers.npy"
    with pytest.raises(ValueError, match=r"holds none of"):
        Palette.load(tmp_path)
    Palette(palettes()["uniform"]).save(path)
    whole = path.read_bytes()
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    pickled = path.read_bytes()
    promising = whole[:128].replace(b"(512, 3), ", b"(5" + b"0" * 9 + b", 3),"[:10])
    for broken in (whole[:1000], whole[:60], b"", b"not numpy", pickled, promising):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"kmeans_centers\.npy: not a palette"):
            Palette.load(path)
    path = tmp_path / "preprocessor_config.json"
    for broken, message in (("{}", "got no 'clusters' key"), ("{", "not a palette"), ('{"clusters": null}', "shape"),
                            ('{"clusters": [[1, 2], [3]]}', "not a palette"), ("[1]", "not a palette")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            Palette.load(path)
    with pytest.raises(ValueError, match=r"absent\.npy: missing"):
        Palette.load(tmp_path / "absent.npy")


@pytest.mark.parametrize("centres, message", [
    (np.zeros((512, 4)), r"centres: got shape \(512, 4\), expected \(k, 3\)"),
    (np.zeros(3), r"centres: got shape \(3,\)"),
    (np.zeros((0, 3)), r"centres: got shape \(0, 3\)"),
    (np.full((2, 3), np.nan), "centres: got 6 values that are NaN"),
    (np.full((2, 3), np.inf), "NaN or infinite"),
    (np.full((2, 3), 255), r"expected \[-1, 1\]"),
    (np.full((2, 3), -1.01), r"got values from -1.01 to -1.01"),
])
def test_bad_centres(centres, message):
    with pytest.raises(ValueError, match=message):
        Palette(centres)


def test_bad_input():
    palette = Palette(palettes()["uniform"])
    good = np.zeros((1, 4, 4, 3), np.uint8)
    for images, message in (
        (good.astype(np.float32), "images: got float32"),
        (torch.from_numpy(good.astype(np.int64)), "images: got int64"),
        (good[..., :2], r"images: got uint8 \(1, 4, 4, 2\), expected uint8"),
        (good[0], r"images: got shape \(4, 4, 3\), expected \(B, H, W, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            palette.encode(images)
    with pytest.raises(ValueError, match=r"got pictures of \(4, 4\), expected the model's \(32, 32\)"):
        palette.encode(good, size=(32, 32))
    for tokens, message in (
        (torch.zeros(1, 4), "tokens: got torch.float32"),
        (torch.zeros(4, dtype=torch.long), r"expected integers \(B, H\*W\)"),
        (torch.zeros(1, 5, dtype=torch.long), r"tokens: got 5 a picture, expected 2 \* 2"),
        (torch.full((1, 4), 512), "tokens: got values from 512 to 512, expected 0 to 511"),
        (torch.full((1, 4), -1), "tokens: got values from -1"),
    ):
        with pytest.raises(ValueError, match=message):
            palette.decode(tokens, (2, 2))
    with pytest.raises(ValueError, match="palette: got 512 colours, expected the model's vocabulary of 256"):
        palette.require(256)
    assert palette.require(512) is palette
    for k in (0, 70_000, 2.5):
        with pytest.raises(ValueError, match="k: got"):
            Palette.fit(good, k=k)

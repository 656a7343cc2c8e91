"""The built-in pictures are what make_emoji.py makes, and their hold-out holds."""

import hashlib
import importlib.util
import io
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch

import igpt.data

ASSETS = Path(igpt.__file__).with_name("assets")


@pytest.fixture(scope="module")
def make_emoji():
    spec = importlib.util.spec_from_file_location("make_emoji", ASSETS / "make_emoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def emoji():
    with np.load(ASSETS / "emoji.npz", allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.mark.parametrize("name", ["emoji.npz", "emoji_palette.npy"])
def test_files_are_the_committed_ones(make_emoji, name):
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == make_emoji.SHA256[name]


def test_rebuilds_bit_for_bit(make_emoji, emoji):
    for path in (make_emoji.FONT, make_emoji.EMOJI_TEST):
        if not path.exists():
            pytest.skip(f"{path} is not installed (Debian: fonts-noto-color-emoji, unicode-data)")
        if hashlib.sha256(path.read_bytes()).hexdigest() != make_emoji.SHA256[path.name]:
            pytest.skip(f"{path} is another version than the one the archive was made from")
    if (made_with := make_emoji.MADE_WITH["pillow"]) != PIL.__version__:
        pytest.skip(f"Pillow {PIL.__version__} is not the {made_with} that the archive was made with")
    rebuilt = make_emoji.build()
    assert list(rebuilt) == list(emoji)
    for name, array in rebuilt.items():
        assert array.dtype == emoji[name].dtype, name
        assert np.array_equal(array, emoji[name]), name
    if make_emoji.MADE_WITH["zlib"] == zlib.ZLIB_RUNTIME_VERSION:
        assert make_emoji.npz_bytes(rebuilt) == (ASSETS / "emoji.npz").read_bytes()


def test_npz_bytes_depend_on_the_arrays_alone(make_emoji, monkeypatch):
    arrays = {"a": np.arange(5), "b": np.array(["x", "yz"])}
    first = make_emoji.npz_bytes(arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert make_emoji.npz_bytes(arrays) == first
    with np.load(io.BytesIO(first), allow_pickle=False) as back:
        assert back["a"].tolist() == [0, 1, 2, 3, 4] and back["b"].tolist() == ["x", "yz"]


def test_contents(emoji):
    n = 1861
    assert emoji["images"].shape == (n, 32, 32, 3) and emoji["images"].dtype == np.uint8
    assert len(np.unique(emoji["images"].reshape(n, -1), axis=0)) == n
    assert len(set(emoji["codepoints"])) == len(set(emoji["names"])) == n
    assert len(emoji["groups"]) == 9 and len(emoji["subgroups"]) == 99
    assert set(emoji["group"]) == set(range(9)) and set(emoji["subgroup"]) == set(range(99))
    assert (emoji["images"][:, 0, 0] == 255).mean() > 0.9, "most have a white corner"
    # Every group and subgroup can be learned: all of them are in train.
    assert set(emoji["subgroup"][emoji["split"] == 0]) == set(range(99))
    # One subgroup, one group.
    assert len({(s, g) for s, g in zip(emoji["subgroup"], emoji["group"])}) == 99


def test_no_look_alike_on_both_sides(make_emoji, emoji):
    flat = emoji["images"].reshape(len(emoji["images"]), -1).astype(np.float64)
    train = flat[emoji["split"] == 0]
    for held_out in (flat[emoji["split"] == 1], flat[emoji["split"] == 2]):
        square = (held_out**2).sum(1)[:, None] + (train**2).sum(1) - 2 * held_out @ train.T
        assert square.min() >= make_emoji.LOOK_ALIKE**2 * flat.shape[1]


def test_notices_carry_the_licences():
    notices = (ASSETS / "NOTICES.md").read_text(encoding="utf-8")
    for phrase in ("2022 Google Inc.", "SIL OPEN FONT LICENSE", "Apache License", "UNICODE, INC."):
        assert phrase in notices


def test_the_model_in_the_box_is_what_its_card_says():
    folder = ASSETS / "emoji"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    model = igpt.ImageGPT.from_pretrained("builtin:emoji", device="cpu")
    valid = igpt.data.load("builtin:emoji", "valid")
    assert model.wte.dtype == torch.bfloat16 and model.palette == valid.palette
    assert sum(p.numel() for p in model.parameters()) == 1_049_856
    tokens = valid.encoded().tokens
    with torch.no_grad():
        losses = [float(model.float().loss(torch.from_numpy(row[None].astype(np.int64)))) for row in tokens]
    loss = np.mean(losses)
    assert abs(loss - model.trained.valid_loss) < 0.002, "bf16 rounds the weights"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{loss:.2f} nats" in card and f"step {model.trained.step:,}" in card
    assert igpt.convert.open_checkpoint("builtin:emoji").config == model.config


def test_palette_is_what_fit_gives():
    """Equal on the processor that made it; elsewhere sums may round differently, and then it must be as good."""
    data = igpt.data.load("builtin:emoji")
    fitted = igpt.Palette.fit(data.images, k=512, seed=0)
    errors = [
        np.square(palette.decode(palette.encode(data.images), data.size).numpy() - data.images.astype(float)).mean()
        for palette in (data.palette, fitted)
    ]
    assert data.palette == fitted or errors[0] <= 1.01 * errors[1]
    assert errors[0] < 30, "RMS below 5.5 grey levels"

"""Training that starts from a checkpoint: the first loss is that model's, and what doesn't fit is named."""

import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import igpt
from igpt.programs import train
from igpt.training import start
from igpt.training.order import Order
from tests import children
from tests.children import options
from tests.test_train import curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*divides attention scores")

STEPS = {"steps": 2, "save_every": 1, "valid_every": 2, "lr": 1e-4}


def scattered(seed: int) -> igpt.Palette:
    return igpt.Palette(np.random.default_rng(seed).uniform(-1, 1, (512, 3)))


def model_of(config: igpt.Config, palette: igpt.Palette | None = None) -> igpt.ImageGPT:
    torch.manual_seed(5)
    model = igpt.ImageGPT(config)
    torch.nn.init.normal_(model.head, 0, 0.2)
    model.palette = palette
    return model


@pytest.fixture(scope="module")
def small():
    """A model of 8x8 pictures, with a palette that is not the emoji's, and a classifier that no pretraining has."""
    return model_of(igpt.Config(2, 32, 2, n_ctx=64, classes=3), scattered(0))


def first_loss(model, pictures) -> float:
    rows = Order(len(pictures), 8, 0).rows(0)
    return model.loss(torch.from_numpy(pictures.tokens[rows].astype(np.int64))).item()


def test_a_model_of_hugging_face_goes_on_with_its_palette(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 513, "initializer_range": 0.1}
    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**sizes))
    theirs.save_pretrained(tmp_path / "hf")
    palette = scattered(1)
    transformers.ImageGPTImageProcessor(clusters=palette.centres.numpy()).save_pretrained(tmp_path / "hf")
    plain = {"layers": None, "width": None, "heads": None, "preset": "s"}
    result = train.run(options(tmp_path / "run", init=str(tmp_path / "hf"), **plain, **STEPS))
    source, trained = (igpt.ImageGPT.from_pretrained(p) for p in (tmp_path / "hf", result["export"]))
    pictures = igpt.data.load("builtin:emoji", size=8).encoded(palette)
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(first_loss(source, pictures), abs=1e-5)
    assert trained.config == source.config and trained.palette == palette
    assert 0 < (trained.wpe - source.wpe).abs().max() < 1e-3  # two steps away


def test_a_run_is_started_from_and_may_then_be_gone(tmp_path):
    first = train.run(options(tmp_path / "first", **STEPS))
    asked = options(tmp_path / "second", init=str(tmp_path / "first"), **STEPS)
    pictures = igpt.data.load("builtin:emoji", size=8).encoded()
    expected = first_loss(igpt.ImageGPT.from_pretrained(first["export"]), pictures)
    child = children.start(children.train_until, replace(asked, steps=20), 3)
    child.join(120)
    assert child.exitcode == 0
    assert curve(tmp_path / "second")[0]["loss"] == pytest.approx(expected, abs=1e-5)
    shutil.rmtree(tmp_path / "first")
    assert train.run(replace(asked, steps=6))["step"] == 6


def test_two_processes_start_from_the_same_weights(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    children.train_together(2, options(tmp_path / "run", init=str(tmp_path / "small"), **STEPS))
    pictures = igpt.data.load("builtin:emoji", size=8).encoded(small.palette)
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(first_loss(small, pictures), abs=1e-5)
    assert igpt.ImageGPT.from_pretrained(tmp_path / "run").config == replace(small.config, classes=0)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": 3}, "layers: got 3, but .*small has 2, expected the same"),
        ({"width": 64}, "width: got 64, but .* has 32"),
        ({"heads": 4}, "heads: got 4, but .* has 2"),
        ({"objective": "bert"}, "objective: got 'bert', but .* has 'ar'"),
        ({"norm": "layer"}, "norm: got 'layer', but .* has 'rms'"),
        ({"size": 4}, r"size: got pictures of \(4, 4\), n_ctx 16, but .* has n_ctx 64, expected the same, or --interp"),
        ({"palette": 16}, "palette: got 16 colours, but .* has 512"),
        ({"palette": 512}, r"palette: got Palette\(512 colours, .*\), but .* has Palette\(512 colours"),
        ({"bare": True}, "palette: .*small came without one, expected --palette"),
        ({"init": None, "interpolate": True}, "interpolate: got it without --init"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(small, tmp_path, changes, said):
    small.save_pretrained(tmp_path / "small")
    if "bare" in changes:
        (tmp_path / "small" / "palette.npy").unlink()
        changes = {}
    if "palette" in changes:
        igpt.Palette(scattered(7).centres[: changes["palette"]]).save(tmp_path / "palette.npy")
        changes = {"palette": tmp_path / "palette.npy"}
    with pytest.raises(ValueError, match=said):
        train.run(options(tmp_path / "run", **{"init": str(tmp_path / "small"), **changes}, **STEPS))
    assert not (tmp_path / "run").exists()


def test_the_preset_is_the_checkpoint_s(tmp_path):
    model_of(igpt.config.preset("tiny", n_ctx=16), scattered(0)).save_pretrained(tmp_path / "tiny")
    asked = options(tmp_path / "run", init=str(tmp_path / "tiny"), size=4, layers=None, width=None, heads=None)
    with pytest.raises(ValueError, match=r"preset: got 'm', but .*tiny has 'tiny'"):
        train.run(replace(asked, preset="m"))
    config = start.checkpoint_of(asked).config
    assert replace(asked, preset="s", batch=None).resolved(config).batch == 16


def test_positions_are_interpolated_when_asked(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    train.run(options(tmp_path / "run", init=str(tmp_path / "small"), size=4, interpolate=True, **STEPS))
    palette = small.palette
    model = model_of(replace(small.config, n_ctx=16))
    model.load_state_dict({**small.state_dict(), "wpe": start.interpolated(small.wpe.detach(), (4, 4))})
    expected = first_loss(model, igpt.data.load("builtin:emoji", size=4).encoded(palette))
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("old, new", [(8, 16), (32, 16), (32, 48)])
def test_interpolation_is_in_the_plane(old, new):
    """A ramp over rows and columns stays that ramp, away from the borders; rows don't become columns."""
    at = (np.arange(old) + 0.5) / old
    wpe = torch.tensor([[row, column, 2 * row - column, 1.0] for row, column in product(at, at)]).float()
    got = start.interpolated(wpe, (new, new)).view(new, new, 4)
    there = torch.tensor((np.arange(new) + 0.5) / new, dtype=torch.float32)
    inner = (there > 2.5 / min(old, new)) & (there < 1 - 2.5 / min(old, new))
    assert inner.sum() >= 6
    row, column = there[inner][:, None], there[inner][None, :]
    for i, expected in enumerate((row + 0 * column, 0 * row + column, 2 * row - column, 1 + 0 * row + 0 * column)):
        assert torch.allclose(got[inner][:, inner][..., i], expected, atol=1e-5)
    assert torch.allclose(start.interpolated(wpe, (old, old)), wpe, atol=1e-6)

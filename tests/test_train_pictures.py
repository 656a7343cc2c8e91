"""From a folder of pictures to training in one line: the palette that is fitted, the tokens that are kept."""

import gzip
import json
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import igpt
from igpt.programs import demo, train
from tests import children
from tests.children import options
from tests.test_train import curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHORT = {"steps": 2, "save_every": 1, "valid_every": 2, "size": None}
COLOURS = 37


def write_pictures(root, n: int, side: int = 8, seed: int = 0) -> None:
    """n pictures of COLOURS colours in all, in two classes."""
    rng = np.random.default_rng(seed)
    colours = np.random.default_rng(9).integers(0, 256, (COLOURS, 3), np.uint8)
    for i in range(n):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours[rng.integers(0, COLOURS, (side, side))]).save(path)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "pictures", 60)
    return tmp_path / "pictures"


def test_a_folder_is_trained_on_in_one_line(folder, tmp_path):
    run = tmp_path / "run"
    line = f"train --data {folder} --size 8 --run {run} --preset tiny --layers 1 --width 32 --steps 2 --batch 8"
    done = subprocess.run([sys.executable, "-m", "igpt", *line.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"has no palette: {COLOURS} colours are fitted to 54 of its training pictures" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    palette, model = igpt.Palette.load(run), igpt.ImageGPT.from_pretrained(result["export"])
    assert model.palette == palette and model.config.vocab == COLOURS and model.config.n_ctx == 64
    tokens = igpt.data.load(f"tokens:{run / 'tokens'}", "train+valid")
    pictures = igpt.data.load(str(folder), "train+valid", size=8)
    decoded = palette.decode(tokens.tokens[:].astype(np.int64), (8, 8))
    assert np.array_equal(decoded, pictures.images)  # every colour has its own


def test_the_tokens_are_made_once(folder, tmp_path):
    asked = options(tmp_path / "run", data=str(folder), **{**SHORT, "size": 8})
    train.run(asked)
    written = (tmp_path / "run" / "tokens" / "tokens.npy").stat().st_mtime_ns
    shutil.rmtree(folder)
    assert train.run(options(tmp_path / "run", data=str(folder), **{**SHORT, "size": 8, "steps": 3}))["step"] == 3
    assert (tmp_path / "run" / "tokens" / "tokens.npy").stat().st_mtime_ns == written


def test_two_processes_wait_for_the_first_one_s_tokens(folder, tmp_path):
    children.train_together(2, options(tmp_path / "two", data=str(folder), **{**SHORT, "size": 8}))
    train.run(options(tmp_path / "one", data=str(folder), **{**SHORT, "size": 8}))
    assert igpt.Palette.load(tmp_path / "one") == igpt.Palette.load(tmp_path / "two")
    one, two = (curve(tmp_path / name)[0]["loss"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=5e-6)


def test_a_start_that_failed_leaves_nothing_that_misleads(folder, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    with pytest.raises(ValueError, match="heads: got 5"):
        train.run(options(run, data=str(folder), heads=5, **{**SHORT, "size": 8}))
    assert [path.name for path in run.iterdir()] == ["tokens"]
    write_pictures(other, 40, seed=1)
    with pytest.raises(ValueError, match=r"out: .*tokens holds other work"):
        train.run(options(run, data=str(other), **{**SHORT, "size": 8}))
    assert train.run(options(run, data=str(folder), **{**SHORT, "size": 8}))["step"] == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        train.run(options(tmp_path / "mine", data=str(folder), **SHORT))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_folder_leaves_a_run_of_other_pictures_as_it_is(folder, tmp_path):
    """Tokens encoded into it would be what its own command goes on with."""
    run, others = tmp_path / "run", tmp_path / "others"
    write_pictures(others, 60, seed=1)
    igpt.data.save_tokens(igpt.data.load(str(others), "train+valid", size=8), tmp_path / "set", igpt.Palette.fit(
        igpt.data.load(str(others), size=8).images, COLOURS))  # fmt: skip
    train.run(options(run, data=str(tmp_path / "set"), **SHORT))
    there = sorted(path.name for path in run.iterdir())
    for target, said in ((run, r"another configuration \(train\.data: .*set there, .*pictures asked\)"),
                         (run / "export", "is a model, expected a new or a run directory")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            train.run(options(target, data=str(folder), **{**SHORT, "size": 8}))
    assert sorted(path.name for path in run.iterdir()) == there
    with pytest.raises(ValueError, match="is a model"):
        demo.run(demo.Options(run=run / "export"))


def test_the_folder_s_own_splits_and_another_model_s_palette_and_size(tmp_path):
    write_pictures(tmp_path / "pictures" / "train", 30, side=12)
    write_pictures(tmp_path / "pictures" / "val", 10, side=12, seed=1)
    model = igpt.ImageGPT(igpt.Config(2, 32, 2, n_ctx=36, vocab=16))
    model.palette = igpt.Palette(np.random.default_rng(3).uniform(-1, 1, (16, 3)))
    model.save_pretrained(tmp_path / "model")
    data = str(tmp_path / "pictures")
    train.run(options(tmp_path / "run", data=data, init=str(tmp_path / "model"), **SHORT))
    sets = [igpt.data.load(str(tmp_path / "run" / "tokens"), split) for split in ("train", "valid")]
    assert [len(s) for s in sets] == [30, 10] and all(s.size == (6, 6) for s in sets)
    assert igpt.Palette.load(tmp_path / "run") == model.palette


def test_an_unreadable_picture_is_named_or_left_out(folder, tmp_path):
    (folder / "a" / "0.png").write_bytes(b"junk")
    asked = {"data": str(folder), **SHORT, "size": 8}
    with pytest.raises(ValueError, match=r"a/0\.png.*skip_bad"):
        train.run(options(tmp_path / "run", **asked))
    train.run(options(tmp_path / "run", skip_bad=True, **asked))
    assert json.loads((tmp_path / "run" / "tokens" / "meta.json").read_text())["skipped"] == ["a/0.png"]


def test_a_set_of_another_kind_gets_a_palette_too(tmp_path, capsys):
    """IDX pictures, which have none: of 40 greys."""
    (tmp_path / "idx").mkdir()
    images = np.random.default_rng(0).integers(0, 40, (50, 28, 28), np.uint8) * 6
    arrays = {"images-idx3": images, "labels-idx1": np.zeros(50, np.uint8)}
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-{kind}-ubyte", array) for kind, array in arrays.items()):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            with gzip.open(tmp_path / "idx" / f"{name}.gz", "wb") as file:
                file.write(header + array.tobytes())
    train.run(options(tmp_path / "run", data=str(tmp_path / "idx"), **SHORT))
    assert "40 colours are fitted to 45 of its training pictures" in capsys.readouterr().err
    train.run(options(tmp_path / "run", data=str(tmp_path / "idx"), **{**SHORT, "steps": 3}))
    assert "are fitted" not in capsys.readouterr().err
    assert len(igpt.Palette.load(tmp_path / "run")) == 40


def test_too_few_pictures_to_hold_any_out(tmp_path):
    write_pictures(tmp_path / "pictures", 4)
    said = "holdout: got 0.1, which leaves 4 pictures of .*pictures to train on and 0 for validation"
    for model in ({}, {"model": "vit-tiny", "preset": "s"}):
        with pytest.raises(ValueError, match=said):
            train.run(options(tmp_path / "run", data=str(tmp_path / "pictures"), **{**SHORT, "size": 8}, **model))

"""probe, lowdata, eval and finetune from end to end, on pictures whose class is their colour."""

import dataclasses
import errno
import json
import os

import numpy as np
import pytest
import torch

import igpt
import igpt.data.folder
from igpt import data
from igpt.palette import Palette
from igpt.programs import classify, features, finetune, info, lowdata, probe
from igpt.programs import eval as evaluate
from igpt.programs import palette as fit_palette
from igpt.programs.source import with_config

SIDE, CLASSES, COLOURS = 6, 3, 16


def coloured(n, seed, labelled=True):
    """n pictures of noise; each class prefers its own third of the colours."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    own = rng.random((n, SIDE * SIDE)) < 0.5
    thirds = labels[:, None] * 5 + rng.integers(0, 5, (n, SIDE * SIDE))
    tokens = np.where(own, thirds, rng.integers(0, COLOURS, (n, SIDE * SIDE))).astype(np.uint16)
    return data.Pictures(
        name="coloured", size=(SIDE, SIDE), tokens=tokens, labels=labels if labelled else None,
        classes=("a", "b", "c") if labelled else (), palette=palette(), vocab=COLOURS,
    )  # fmt: skip


def palette():
    return Palette(np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a token set and a random AR and BERT model."""
    folder = tmp_path_factory.mktemp("programs")
    for split, n in (("train", 300), ("valid", 60), ("test", 60)):
        data.save_tokens(coloured(n, n), folder / "set" / split)
    for objective in ("ar", "bert"):
        torch.manual_seed(0)
        config = igpt.Config(2, 32, 2, n_ctx=SIDE * SIDE, vocab=COLOURS, objective=objective)
        model = igpt.ImageGPT(config)
        torch.nn.init.normal_(model.head, 0, 0.2)
        model.palette = palette()
        model.save_pretrained(folder / objective)
    return folder


def where(here, objective="ar"):
    return {"model": str(here / objective), "data": str(here / "set"), "device": "cpu", "batch": 50}


def test_probe_of_a_part(here):
    report = probe.run(probe.Options(**where(here), C=(0.01,), only=(1,), limit_train=100, limit_test=30))
    assert report["pictures"] == [100, 20, 30]
    for name in ("limit_train", "limit_test"):
        with pytest.raises(ValueError, match=f"{name}: got 0"):
            probe.run(probe.Options(**where(here), **{name: 0}))


@pytest.mark.parametrize("objective, votes", [("ar", 1), ("bert", 3)])
def test_probe(here, tmp_path, objective, votes):
    report = probe.run(probe.Options(**where(here, objective), C=(0.01, 1.0), votes=votes, out=tmp_path))
    assert set(report["layers"]) == {"0", "1", "2"}
    # Even a random network's pooled features count colours; a third would be chance.
    assert report["test_accuracy"] > 0.7
    assert json.loads((tmp_path / "probe.json").read_text()) == report
    assert (tmp_path / "probe.png").stat().st_size > 1000
    again = probe.run(probe.Options(**where(here, objective), C=(0.01, 1.0), votes=votes))
    assert again == report
    options = probe.Options(**where(here, objective), C=(1.0,), only=(1,), out=tmp_path)
    with pytest.raises(ValueError, match=r"out: .* holds \['probe.json', 'probe.png'\] already; --force"):
        probe.run(options)
    assert json.loads((tmp_path / "probe.json").read_text()) == report
    assert set(probe.run(dataclasses.replace(options, force=True))["layers"]) == {"1"}


def test_probe_of_joined_layers_and_sgd(here):
    report = probe.run(probe.Options(**where(here), join=2, solver="sgd", steps=300, lr=(10.0, 3.0)))
    assert len(report["joined"]) == 2 and report["test_accuracy"] > 0.7


def test_features_are_the_models(here):
    model = igpt.ImageGPT.from_pretrained(here / "ar")
    tokens = coloured(7, 1).tokens
    want = model.features(torch.from_numpy(tokens.astype(np.int64))).detach()
    found = features.extract(probe.Options(**(where(here) | {"batch": 3})), model, tokens)
    torch.testing.assert_close(torch.from_numpy(np.array(found)), want)
    short = features.extract(probe.Options(**where(here), dtype="bf16"), model, tokens)
    error = (torch.from_numpy(np.array(short)) - want).abs().max() / want.abs().max()
    assert 0 < error < 2**-5, "bf16 rounds to 2**-9, a few times over on the way through the model"


def test_a_disk_too_small_for_the_features_is_said_before_any_work(here, monkeypatch):
    """Written through a memory map, the first page without room would be a bus error."""

    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, f"No space left on device for {length}")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(igpt.ImageGPT, "features", None)
    with pytest.raises(OSError, match=f"No space left on device for {4 * 3 * 300 * 32}"):
        probe.run(probe.Options(**where(here)))


def test_lowdata(here):
    report = lowdata.run(lowdata.Options(**where(here), k=(4, 40), subsets=3))
    few, many = report["k"]["4"], report["k"]["40"]
    assert few["labels"] == 12 and many["labels"] == 120
    assert many["error"] < few["error"] < 67


def test_eval_is_the_models_loss(here):
    report = evaluate.run(evaluate.Options(**where(here)))
    model = igpt.ImageGPT.from_pretrained(here / "ar")
    tokens = torch.from_numpy(coloured(60, 60).tokens.astype(np.int64))
    # `test` was drawn with seed 60 as `valid` was; batches of 50 and 10 must weigh as pictures.
    assert report["nats_per_pixel"] == pytest.approx(model.loss(tokens).item(), rel=1e-5)
    assert report["bits_per_pixel"] == pytest.approx(report["nats_per_pixel"] / np.log(2))
    assert evaluate.run(evaluate.Options(**where(here), limit=5))["pictures"] == 5


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_finetune_learns_and_exports(here, tmp_path, objective):
    options = finetune.Options(**where(here, objective), epochs=4, lr=3e-3, out=tmp_path / "tuned")
    report = finetune.run(options)
    assert report["test_accuracy"] > 0.8
    assert report["epochs"][-1]["classifying"] < report["epochs"][0]["classifying"]
    tuned = igpt.ImageGPT.from_pretrained(tmp_path / "tuned")
    assert tuned.config.classes == CLASSES and tuned.classifier.abs().max() > 0
    assert tuned.palette == palette() and tuned.class_names == ("a", "b", "c")
    judged = evaluate.run(evaluate.Options(**(where(here) | {"model": str(tmp_path / "tuned")})))
    assert judged["accuracy"] == pytest.approx(report["test_accuracy"], abs=1e-4)
    with pytest.raises(ValueError, match=r"out: .* not empty"):
        finetune.run(options)


@pytest.fixture(scope="module")
def classifier(here):
    """A model that tells pictures by the red in them: "dark" or "red"."""
    model = with_config(igpt.ImageGPT.from_pretrained(here / "ar"), classes=2)
    model.palette, model.class_names = Palette(np.linspace(-1, 1, COLOURS)[:, None] * [1, 0, 0]), ("dark", "red")
    with torch.no_grad():
        dark, red = (model.features(torch.full((1, SIDE * SIDE), token))[-1, 0] for token in (0, COLOURS - 1))
        model.classifier.copy_(torch.stack([dark - red, red - dark]))
    model.save_pretrained(here / "classifier")
    return here / "classifier"


def write_squares(root, reds):
    from PIL import Image

    for name, red in reds.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (red, 128, 128)).save(root / name)


def test_classify(classifier, tmp_path, capsys):
    write_squares(tmp_path, {"a.png": 255, "more/b.png": 0, "more/c.png": 255})
    (tmp_path / "more" / "bad.png").write_bytes(b"no picture")
    options = classify.Options(model=str(classifier), pictures=(tmp_path / "a.png", tmp_path / "more"), device="cpu")
    with pytest.raises(ValueError, match=r"bad\.png: unreadable picture"):
        classify.run(options)
    report = classify.run(dataclasses.replace(options, skip_bad=True, top=2))
    assert report["pictures"] == 3 and report["skipped"] == 1
    likeliest = [(name.removeprefix(f"{tmp_path}/"), next(iter(found))) for name, found in report["classes"].items()]
    assert likeliest == [("a.png", "red"), ("more/b.png", "dark"), ("more/c.png", "red")]
    for found in report["classes"].values():
        assert set(found) == {"dark", "red"} and sum(found.values()) == pytest.approx(1, abs=2e-4)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert f"{tmp_path}/a.png: red {report['classes'][f'{tmp_path}/a.png']['red']:.4f}, dark" in capsys.readouterr().out
    for change, words in (({"top": 3}, "top: got 3, expected 1 to the model's 2"), ({"pictures": ()}, "got none")):
        with pytest.raises(ValueError, match=words):
            classify.run(dataclasses.replace(options, **change))


def test_classify_asks_for_a_classifier(here, tmp_path):
    with pytest.raises(ValueError, match="has no classifier"):
        classify.run(classify.Options(model=str(here / "ar"), pictures=(tmp_path / "a.png",), device="cpu"))


@pytest.mark.parametrize("folders, accuracy", [(("dark", "red"), 0.75), (("red",), 1.0), (("blue", "red"), None)])
def test_eval_takes_classes_by_their_names(classifier, tmp_path, folders, accuracy):
    """Whatever order the set has them in; where it has others there is no accuracy, and that is said."""
    reds = {"dark/0.png": 0, "dark/1.png": 255, "red/0.png": 255, "red/1.png": 250, "blue/0.png": 0}
    write_squares(tmp_path, {name: red for name, red in reds.items() if name.split("/")[0] in folders})
    options = evaluate.Options(model=str(classifier), data=str(tmp_path), split="train", holdout=0.0, device="cpu")
    if accuracy is None:
        with pytest.warns(UserWarning, match=r"no accuracy: .* \('blue', 'red'\), the model \('dark', 'red'\)"):
            assert "accuracy" not in evaluate.run(options)
    else:
        assert evaluate.run(options)["accuracy"] == accuracy


@pytest.mark.parametrize("names, kept", [(("a", "b", "c"), True), (("x", "y", "z"), False)])
def test_finetuning_again_keeps_a_classifier_of_the_same_classes_only(here, tmp_path, names, kept):
    model = with_config(igpt.ImageGPT.from_pretrained(here / "ar"), classes=3)
    torch.nn.init.ones_(model.classifier)
    model.class_names = names
    model.save_pretrained(tmp_path / "model")
    again = {"model": str(tmp_path / "model"), "out": tmp_path / "again", "epochs": 1, "lr": 1e-9, "limit_train": 40}
    finetune.run(finetune.Options(**(where(here) | again)))
    tuned = igpt.ImageGPT.from_pretrained(tmp_path / "again")
    assert tuned.class_names == ("a", "b", "c")
    assert torch.allclose(tuned.classifier, torch.tensor(float(kept)), atol=1e-6)


def test_with_config_keeps_the_weights(here):
    model = igpt.ImageGPT.from_pretrained(here / "ar")
    other = with_config(model, classes=5)
    assert other.classifier.shape == (5, 32) and not other.classifier.any()
    assert all(torch.equal(p, dict(other.named_parameters())[name]) for name, p in model.named_parameters())


def test_a_palette_of_few_pictures_reads_few(tmp_path, monkeypatch):
    from PIL import Image

    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    (tmp_path / "00.png").write_bytes(b"no picture")
    read, real = [], igpt.data.folder.read_squares

    def watched(root, names, places, workers, **how):
        read.append(places)
        return real(root, names, places, 0, **how)

    monkeypatch.setattr(igpt.data.folder, "read_squares", watched)
    options = fit_palette.Options(data=str(tmp_path), out=tmp_path / "palette.npy", k=8, size=8, limit=5)
    with pytest.raises(ValueError, match=r"00\.png: unreadable picture"):
        fit_palette.run(options)
    read.clear()
    assert fit_palette.run(dataclasses.replace(options, skip_bad=True))["pictures"] == 4
    with pytest.raises(ValueError, match=r"out: .*palette\.npy is there already; --force"):
        fit_palette.run(dataclasses.replace(options, skip_bad=True))
    with pytest.raises(ValueError, match=r"out: got .*palette\.png, expected a name that ends in \.npy"):
        fit_palette.run(dataclasses.replace(options, out=tmp_path / "palette.png", force=True))
    kept, held = data.hold_out(60, 0.1)
    assert [places.tolist() for places in read] == [[0, *kept[[13, 26, 39, 53]]], held[[0, 1, 2, 3, 5]].tolist()]


def test_a_palette_of_fewer_pictures_than_can_be_held_out(tmp_path):
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "only.png")
    report = fit_palette.run(fit_palette.Options(data=str(tmp_path), out=tmp_path / "palette.npy", k=8, size=8))
    assert report["mse"] > 0 and report["valid_mse"] is None
    with pytest.raises(ValueError, match="seed: got -1, expected an integer from 0 to"):
        Palette.fit(np.zeros((8, 8, 3), np.uint8), k=1, seed=-1)


def test_bad_input(here, tmp_path):
    for change, words in [
        ({"only": (7,)}, "only: got layers"), ({"votes": 2}, "votes: got 2"), ({"join": 9}, "join: got 9"),
        ({"batch": 0}, "batch: got 0"),
        ({"model": str(here / "none")}, "none"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            probe.run(probe.Options(**(where(here) | change)))
    with pytest.raises(ValueError, match="layer: got 9"):
        lowdata.run(lowdata.Options(**where(here), layer=9))
    with pytest.raises(ValueError, match="limit: got 0"):
        evaluate.run(evaluate.Options(**where(here), limit=0))
    with pytest.raises(ValueError, match="lr"):
        finetune.run(finetune.Options(**where(here), lr=0.0))
    with pytest.raises(ValueError, match="generative: got nan"):
        finetune.run(finetune.Options(**where(here), generative=float("nan")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out: .*file exists and is not empty"):
        finetune.run(finetune.Options(**where(here), out=tmp_path / "file"))
    for memory in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"memory: got {memory}, expected a positive number"):
            info.run(info.Options(memory=memory))

    for split in ("train", "valid", "test"):
        data.save_tokens(coloured(20, 1, labelled=False), tmp_path / "bare" / split)
    with pytest.raises(ValueError, match="labels are missing"):
        probe.run(probe.Options(**(where(here) | {"data": str(tmp_path / "bare")})))

    narrow = coloured(20, 1)
    narrow = dataclasses.replace(narrow, vocab=8, tokens=narrow.tokens % 8, palette=Palette(np.eye(8, 3)))
    data.save_tokens(narrow, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"holds tokens of Palette\(8 colours"):
        evaluate.run(evaluate.Options(**(where(here) | {"data": str(tmp_path / "wide"), "split": "train"})))


def test_tokens_of_another_palette_are_refused(here, tmp_path):
    """As many colours, but others: the ids fit, and mean something else."""
    other = Palette(-palette().centres)
    other.save(tmp_path / "other.npy")
    with pytest.raises(ValueError, match="palette: got Palette"):
        evaluate.run(evaluate.Options(**where(here), palette=tmp_path / "other.npy"))
    model = igpt.ImageGPT.from_pretrained(here / "ar")
    model.palette = other
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds tokens of Palette"):
        evaluate.run(evaluate.Options(**(where(here) | {"model": str(tmp_path / "model")})))


def test_a_gpu_that_is_not_there_is_refused(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: got 'cuda', but there is no GPU"):
        evaluate.run(evaluate.Options(**(where(here) | {"device": "cuda"})))


def test_settings_of_the_solver_are_checked_before_the_features(here, monkeypatch):
    monkeypatch.setattr(features, "extract", None)
    for change in ({"C": (0.1, -1.0)}, {"lr": (0.0,)}, {"steps": 0}):
        with pytest.raises(ValueError, match="C, lr, steps: got"):
            probe.run(probe.Options(**where(here), **change))
    for change in ({"C": float("nan")}, {"k": ()}):
        with pytest.raises(ValueError, match="k, C: got"):
            lowdata.run(lowdata.Options(**where(here), **change))

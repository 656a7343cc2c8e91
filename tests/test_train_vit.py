"""Training a ViT: by labels, resumed, on two processes, by corrupted patches, fine-tuned at another resolution."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import igpt
from igpt.programs import eval as evaluate
from igpt.programs import info, train
from igpt.training import start
from igpt.training.order import Order
from igpt.training.processes import processes
from tests import children
from tests.test_train import agree, curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def options(run, **changes) -> train.Options:
    """A run that takes a moment: 16 patches of 4 x 4 pixels."""
    small = {"model": "vit-tiny", "preset": "s", "layers": 2, "width": 32, "size": 16, "lr": 0.005}
    return children.options(run, **{**small, **changes})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("vit") / "unbroken"
    return run, train.run(options(run))


def test_a_run_learns_labels_and_exports_its_best_model(unbroken):
    run, result = unbroken
    rows = curve(run)
    assert rows[0]["loss"] == pytest.approx(math.log(9), abs=1e-6)  # the head starts at zero
    assert rows[-1]["valid_loss"] < math.log(9)
    model = igpt.ViT.from_pretrained(result["export"])
    assert model.class_names[0] == "Smileys & Emotion" and model.config.classes == 9
    assert igpt.ViT.from_pretrained(run, step="last").config == model.config
    valid = igpt.data.load("builtin:emoji", "valid", size=16).rows(slice(20))
    pixels, labels = torch.from_numpy(valid.images), torch.from_numpy(valid.labels)
    assert model.loss(pixels, labels).item() == pytest.approx(result["exported"]["valid_loss"], abs=1e-5)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (said,) = [row for row in lines if "valid_loss" in row and row["step"] == result["exported"]["step"]]
    assert (model(pixels).argmax(-1) == labels).double().mean().item() == pytest.approx(said["valid_accuracy"])


def test_eval_says_how_often_it_is_right(unbroken):
    asked = evaluate.Options(model=str(unbroken[0]), data="builtin:emoji", split="valid", limit=20)
    said, trained = evaluate.run(asked), unbroken[1]["exported"]["valid_loss"]
    assert said["pictures"] == 20 and said["nats_per_picture"] == pytest.approx(trained, abs=1e-5)
    assert 0 <= said["accuracy"] <= 1
    with pytest.raises(ValueError, match="is a ViT, expected an Image GPT"):
        info.run(info.Options(model=str(unbroken[0])))
    with pytest.raises(ValueError, match=r"has classes .*, the model"):
        evaluate.run(replace(asked, labels="subgroup"))


def test_stopped_and_resumed_it_is_the_same_run(unbroken, tmp_path):
    child = children.start(children.train_until, options(tmp_path / "run"), 6)
    child.join(120)
    assert child.exitcode == 0 and 6 <= curve(tmp_path / "run")[-1]["step"] < 12
    result = train.run(options(tmp_path / "run"))
    assert agree(curve(tmp_path / "run"), curve(unbroken[0])) and result["valid_loss"] == unbroken[1]["valid_loss"]


def test_two_processes_train_as_one(unbroken, tmp_path):
    child = children.start(children.train_together, 2, options(tmp_path / "run"))
    child.join(300)
    assert child.exitcode == 0
    assert agree(curve(tmp_path / "run"), curve(unbroken[0]), 2e-5)


def test_the_papers_recipe():
    filled = train.Options("run", model="vit-b16").resolved()
    assert (filled.batch, filled.lr, filled.weight_decay, filled.warmup) == (4096, 0.003, 0.3, 9375)
    assert (filled.beta1, filled.beta2, filled.objective, filled.clip) == (0.9, 0.999, "labels", 1.0)
    filled = train.Options("run", model="vit-b16", objective="patches").resolved()
    assert (filled.steps, filled.lr, filled.warmup) == (1_000_000, 0.0002, 10_000)
    assert train.Options("run").resolved().weight_decay is None


def test_weights_decay_and_vectors_do_not(tmp_path):
    """By the step's formula, where no gradient moves them: lr * decay of themselves."""
    with processes("cpu") as us:
        asked = options(tmp_path / "run", weight_decay=0.5).resolved()
        training = train.Training(asked, us, 8, train.task_of(asked, us, None))
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    training.optimizers[0].param_groups[0]["lr"] = 0.1
    training.optimizers[0].step()
    for name, p in training.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 if p.dim() == 1 else 0.95))


def test_augmentation_is_the_same_however_many_share_a_batch(tmp_path):
    with processes("cpu") as us:
        asked = options(tmp_path / "run", augment=True).resolved()
        task = train.task_of(asked, us, None)
    rows = np.arange(5, 13)
    plain, labels = task.inputs(task.train, rows)
    whole, same = task.inputs(task.train, rows, 0, 1)
    parts = [task.inputs(task.train, rows, 0, 1, mine=part)[0] for part in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(labels, same)
    assert not torch.equal(whole, plain) and not torch.equal(task.inputs(task.train, rows, 0, 2)[0], whole)
    with pytest.raises(ValueError, match="augment: got it for an Image GPT"):
        train.Options("run", augment=True).resolved()


def test_patches_are_learnt_from_their_surroundings(tmp_path):
    """The objective of corrupted patches falls below ln 512, and below what the colours' shares alone would give."""
    result = train.run(options(tmp_path / "run", objective="patches", steps=60, lr=0.003, batch=16, save_every=60))
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(512), abs=1e-5)
    assert result["valid_loss"] < math.log(512) - 2
    model = igpt.ViT.from_pretrained(tmp_path / "run")
    assert model.config.objective == "patches" and model.class_names == ()
    with pytest.raises(ValueError, match=r"model: .*run has objective 'patches' and 0 classes, expected a ViT that"):
        evaluate.run(evaluate.Options(model=str(tmp_path / "run"), data="builtin:emoji"))


def test_fine_tuning_at_another_resolution(unbroken, tmp_path):
    """Positions are interpolated in the plane, the class token's stays; the head stays for the same labels."""
    asked = options(tmp_path / "run", init=unbroken[1]["export"], size=24, interpolate=True, steps=2, lr=1e-5)
    train.run(replace(asked, model=None, layers=None, width=None, heads=None))
    old = igpt.ViT.from_pretrained(unbroken[1]["export"])
    model = igpt.ViT(replace(old.config, size=24))
    grown = torch.cat([old.wpe[:1], start.interpolated(old.wpe[1:].detach(), (6, 6))])
    model.load_state_dict({**old.state_dict(), "wpe": grown})
    pictures = igpt.data.load("builtin:emoji", size=24)
    rows = Order(len(pictures), 8, 0).rows(0)
    expected = model.loss(torch.from_numpy(pictures.images[rows]), torch.from_numpy(pictures.labels[rows]))
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_other_labels_and_objectives_get_a_head_of_zeros(unbroken, tmp_path):
    asked = {"init": unbroken[1]["export"], "steps": 1, "lr": 1e-5}
    train.run(options(tmp_path / "patches", objective="patches", **asked))
    assert curve(tmp_path / "patches")[0]["loss"] == pytest.approx(math.log(512), abs=1e-5)
    model = igpt.ViT.from_pretrained(unbroken[1]["export"])
    model.class_names = tuple("abcdefghi")
    model.save_pretrained(tmp_path / "renamed")
    train.run(options(tmp_path / "labels", **{**asked, "init": str(tmp_path / "renamed")}))
    assert curve(tmp_path / "labels")[0]["loss"] == pytest.approx(math.log(9), abs=1e-6)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"objective": "ar"}, r"objective: got 'ar', expected one of \('labels', 'patches'\)"),
        ({"model": None, "objective": "labels"}, r"objective: got 'labels', expected one of \('ar', 'bert'\)"),
        ({"preset": "tiny"}, "preset: got 'tiny' for a ViT"),
        ({"norm": "layer"}, "norm: got 'layer' for a ViT"),
        ({"weight_decay": -1.0}, "weight_decay: got -1.0"),
        ({"size": 18}, "size: got 18, expected a multiple of the patch's 4"),
        ({"data": "tokens"}, "data: .* expected pictures: a ViT reads pixels"),
        ({"data": "bare"}, "labels are missing"),
        ({"init": "vit", "size": 24}, "size: got 24, but .* has 16, expected the same, or --interpolate"),
        ({"init": "vit", "width": 64}, "width: got 64, but .* has 32"),
        ({"init": "gpt"}, "model: got 'vit-tiny', but .* is an Image GPT"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(unbroken, tmp_path, changes, said):
    if changes.get("data") == "tokens":
        pictures = igpt.data.load("builtin:emoji", "valid", size=16).encoded()
        for split in ("train", "test"):
            igpt.data.save_tokens(pictures, tmp_path / "tokens" / split)
    if changes.get("data") == "bare":
        from PIL import Image

        (tmp_path / "bare").mkdir()
        for i in range(20):
            Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / "bare" / f"{i}.png")
    if changes.get("init") == "gpt":
        igpt.ImageGPT(igpt.Config(2, 32, 2, n_ctx=256)).save_pretrained(tmp_path / "gpt")
    there = {"vit": unbroken[1]["export"], "gpt": str(tmp_path / "gpt"), "tokens": str(tmp_path / "tokens")}
    there["bare"] = str(tmp_path / "bare")
    asked = {k: there.get(v, v) if isinstance(v, str) and k in ("init", "data") else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=said):
        train.run(options(tmp_path / "run", **asked))
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_was(unbroken):
    said = json.loads((unbroken[0] / "config.json").read_text())
    assert said["model"]["patch"] == 4 and said["train"]["model"] == "vit-tiny"
    assert said["train"]["weight_decay"] == 0.1 and said["train"]["palette"] is None

"""Pretraining: what a run writes, what resumes bit for bit, what many processes compute, what is refused."""

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt import machine
from igpt.programs import info, train
from igpt.sample import decoder
from igpt.training.order import Order
from igpt.training.processes import Processes, processes
from igpt.training.rundir import held
from tests import children
from tests.children import options

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CURVE = ("step", "loss", "lr", "grad_norm", "valid_loss")


def curve(run: Path) -> list[dict]:
    """metrics.jsonl without speed and time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in CURVE if k in row} for row in rows]


def agree(one: list[dict], other: list[dict], tolerance: float = 5e-6) -> bool:
    """The same lines, losses equal to 5 decimals. Gradient norms are as large as 2 and are compared alike."""
    return [row.keys() for row in one] == [row.keys() for row in other] and all(
        abs(a[k] - b[k]) <= tolerance * max(1, abs(a[k])) for a, b in zip(one, other) for k in a
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """One run from end to end in this process: (directory, result)."""
    run = tmp_path_factory.mktemp("train") / "unbroken"
    return run, train.run(options(run, sample_every=12))


def test_a_run_writes_what_the_design_names(unbroken):
    run, result = unbroken
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 13))
    assert all({"loss", "lr", "grad_norm", "images_per_s", "time"} <= row.keys() for row in trained)
    assert trained[0]["loss"] == pytest.approx(math.log(512), abs=1e-6)  # the head starts at zero
    assert [row["step"] for row in rows if "valid_loss" in row] == [4, 8, 12]
    assert rows[-1]["valid_loss"] < math.log(512) - 0.1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-12", "step-8"]
    assert Image.open(run / "samples" / "step-0000012.png").size == (4 * (4 * 10 + 2),) * 2
    assert result["step"] == 12 and result["valid_loss"] == rows[-1]["valid_loss"]


def test_the_export_is_the_trained_model(unbroken):
    run, result = unbroken
    model = igpt.ImageGPT.from_pretrained(result["export"])
    assert model.config == igpt.Config.from_dict(json.loads((run / "config.json").read_text())["model"])
    palette = igpt.Palette.load(result["export"])
    valid = igpt.data.load("builtin:emoji", "valid", size=8).encoded(palette)
    tokens = torch.from_numpy(valid.tokens[:20].astype(np.int64))
    assert model.loss(tokens).item() == pytest.approx(result["valid_loss"], abs=1e-5)


def test_killed_at_random_points_it_resumes_bit_for_bit(tmp_path):
    seed = time.time_ns()
    dice = random.Random(seed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    metrics = broken / "metrics.jsonl"

    def start(run: Path) -> subprocess.Popen:
        asked = ["--preset", "tiny", "--data", "builtin:emoji", "--run", str(run), "--steps", "24"]
        asked += ["--size", "16", "--batch", "4", "--log-every", "1", "--valid-pictures", "16", "--sample-every", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # what threads share out must add up in one order
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([sys.executable, "-m", "igpt", "train", *asked], env=environment, **quiet)

    unbroken = start(whole)
    for lines in sorted(dice.sample(range(1, 31), 3)):  # of 36, after which there is a moment left for each kill
        child = start(broken)
        while child.poll() is None and (not metrics.is_file() or metrics.read_text().count("\n") < lines):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.5))
        child.kill()
        assert child.wait() == -signal.SIGKILL, f"dice of seed {seed}"
    assert start(broken).wait() == unbroken.wait() == 0
    assert curve(broken) == curve(whole) and len(curve(whole)) >= 24, f"dice of seed {seed}"


def test_killed_before_every_rename_it_resumes_bit_for_bit(unbroken, tmp_path):
    run, nth, code = tmp_path / "run", -1, None
    while code != 0:
        nth += 2
        child = children.start(children.train_killed_at, options(run), nth)
        child.join(120)
        code = child.exitcode
        assert code in (0, -signal.SIGKILL) and nth < 40
    assert nth > 6
    assert curve(run) == curve(unbroken[0])


def test_a_run_that_is_being_trained_is_left_alone(tmp_path):
    run = tmp_path / "run"
    half_written = run / "checkpoints" / ".writing-step-4"
    with held(run, Processes(0, 1, torch.device("cpu"))):
        half_written.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"train": {"data": "builtin:emoji"}}))
        with pytest.raises(ValueError, match=r"run: .*run is being trained by another process"):
            train.run(options(run))
        assert half_written.is_dir()
    shutil.rmtree(run)
    assert train.run(options(run, steps=1))["step"] == 1


def test_sigterm_saves_and_exits_0(unbroken, tmp_path):
    run = tmp_path / "run"
    child = children.start(children.train_until, options(run), 6)
    child.join(120)
    assert child.exitcode == 0
    assert (run / "checkpoints" / "latest").read_text() == "step-7" and not (run / "export").exists()
    train.run(options(run))
    assert curve(run) == curve(unbroken[0])


def test_accumulated_and_recomputed_steps_are_the_same_steps(unbroken, tmp_path):
    train.run(options(tmp_path / "accumulated", accumulate=4, steps=12))
    assert agree(curve(tmp_path / "accumulated"), curve(unbroken[0]))
    train.run(options(tmp_path / "recomputed", recompute="block", steps=12))
    assert curve(tmp_path / "recomputed") == curve(unbroken[0])


def test_one_two_and_four_processes_share_a_run(unbroken, tmp_path):
    run = tmp_path / "run"
    alone = children.start(children.train_until, options(run), 2)
    alone.join(120)
    children.train_together(2, options(run), 5)
    children.train_together(4, options(run), 7)
    train.run(options(run))
    assert agree(curve(run), curve(unbroken[0]))


def test_kernels_train_under_fsdp(tmp_path):
    igpt.Palette(np.random.default_rng(0).uniform(-1, 1, (16, 3))).save(tmp_path / "palette.npy")
    asked = {"steps": 2, "batch": 4, "save_every": 2, "valid_every": 2, "valid_pictures": 4}
    asked |= {"size": 4, "palette": tmp_path / "palette.npy"}  # interpreted, each tile of a table counts
    train.run(options(tmp_path / "torch", **asked))
    for dtype, tolerance in (("fp32", {}), ("bf16", {"tolerance": 2**-8})):
        children.train_together(2, options(tmp_path / dtype, impl="triton", dtype=dtype, **asked))
        assert agree(curve(tmp_path / dtype), curve(tmp_path / "torch"), **tolerance)


def test_torchrun_masks_and_bf16(tmp_path):
    asked = options(tmp_path / "one", objective="bert", steps=4, save_every=4)
    train.run(asked)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "igpt", "--", "train"]
    for name in ("preset", "objective", "layers", "width", "heads", "size", "batch", "steps", "save_every",
                 "valid_every", "valid_pictures", "sample_every", "log_every", "device"):  # fmt: skip
        command += [f"--{name.replace('_', '-')}", str(getattr(asked, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--run", str(tmp_path / "two")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 4
    assert agree(curve(tmp_path / "two"), curve(tmp_path / "one"))
    assert igpt.ImageGPT.from_pretrained(tmp_path / "two" / "export").config.objective == "bert"
    children.train_together(2, dataclasses.replace(asked, run=tmp_path / "bf16", dtype="bf16"))
    assert agree(curve(tmp_path / "bf16"), curve(tmp_path / "one"), tolerance=2**-8)


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(tmp_path):
    asked = options(tmp_path / "run", save_every=1, lr=1e30, warmup=0, clip=None)
    with pytest.raises(FloatingPointError, match=r"step 2: .* checkpoint is .*/checkpoints/step-1"):
        train.run(asked)


def test_a_grid_too_large_for_the_memory_is_drawn_in_parts(tmp_path, monkeypatch):
    """A run of days doesn't end for it: the pictures are the same."""
    train.run(options(tmp_path / "whole", steps=1, sample_every=1))
    monkeypatch.setattr(decoder, "available_bytes", lambda device: 300_000)  # the cache of 16 takes 524,288
    with pytest.warns(UserWarning, match="batch: 1 at once, as memory allows, not 16"):
        train.run(options(tmp_path / "parts", steps=1, sample_every=1))
    whole, parts = ((tmp_path / run / "samples" / "step-0000001.png").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_another_configuration_is_refused_with_the_difference(unbroken, tmp_path):
    run, _ = unbroken
    with pytest.raises(ValueError, match=r"another configuration \(train\.lr: 0\.003 there, 0\.001 asked; train.seed"):
        train.run(options(run, lr=0.001, seed=3))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and has no config\.json"):
        train.run(options(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train.run(options(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch": 9, "accumulate": 2}, "batch: got 9, expected a multiple of 1 processes"),
        ({"steps": 0}, "steps: got 0"),
        ({"size": 0}, "size: got 0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"clip": 0.0}, "clip: got 0.0"),
        ({"beta2": 1.0}, "beta1, beta2"),
        ({"warmup": -1}, "warmup"),
        ({"data": "nowhere"}, "nowhere"),
        ({"heads": 5}, "heads: got 5"),
    ],
)
def test_bad_options(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train.run(options(tmp_path / "run", **changes))


def test_defaults_are_the_paper_s():
    for name, lr in {"s": 0.003, "m": 0.003, "l": 0.001, "xl": 0.0003}.items():
        filled = train.Options(Path("x"), preset=name).resolved()
        assert filled.lr == lr
        assert (filled.batch, filled.steps) == ((64, 2_000_000) if name == "xl" else (128, 1_000_000))
    assert train.Options(Path("x"), preset="s", objective="bert").resolved().lr == 0.01


def test_learning_rate_warms_up_and_falls_to_zero(tmp_path):
    asked = options(tmp_path / "run", steps=100, lr=1.0, warmup=10).resolved()
    with processes("cpu") as us:
        training = train.Training(asked, us, 8, train.task_of(asked, us, None))
    rates = [training.lr(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_order_sees_every_picture_once_an_epoch():
    order = Order(10, 4, seed=3)
    seen = np.concatenate([order.rows(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    assert np.array_equal(Order(10, 4, seed=3).rows(4), order.rows(4))
    assert not np.array_equal(np.concatenate([Order(10, 4, seed=4).rows(s) for s in range(5)]), seen)
    assert Order(3, 8, seed=0).rows(7).shape == (8,)  # a batch of several epochs


def test_tensorboard_gets_the_same_figures(tmp_path, monkeypatch):
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="tensorboard: it is not installed"):
        train.run(options(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train.run(options(tmp_path / "run", tensorboard=True, steps=2))
    last = curve(tmp_path / "run")[-1]
    assert seen[0] == ("tensorboard", 1) and seen[-1] == "closed"
    assert ("valid_loss", last["valid_loss"], 2) in seen and {"lr", "loss", "grad_norm"} <= {name for name, *_ in seen}


def test_memory_plan_counts_what_a_training_step_keeps():
    """Bytes of the distinct tensors saved for backward, weights apart, against `igpt info`'s formula."""
    model, kept = igpt.ImageGPT.from_preset("tiny", n_ctx=64).to(torch.bfloat16), {}
    weights = {p.shape for p in model.parameters()} | {p.t().shape for p in model.parameters() if p.dim() == 2}

    def keep(t):
        if t.dtype == torch.bfloat16 and t.shape not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.loss(torch.randint(0, 512, (3, 64)))
    assert loss.requires_grad and sum(kept.values()) == pytest.approx(3 * info.activations(model.config), rel=0.1)
    assert info.activations(model.config, recompute=True) < 0.5 * info.activations(model.config)


def test_peak_flops_are_known_by_name(monkeypatch):
    names = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "Something": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine.peak_flops(torch.device("cuda")) == peak
    assert machine.peak_flops(torch.device("cpu")) is None

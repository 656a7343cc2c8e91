"""A run is a model at any moment: its best checkpoint, another, one that a kill left; made longer, and cut short."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import igpt
from igpt import convert
from igpt.convert import runs
from igpt.programs import cli, train
from tests import children
from tests.children import options
from tests.test_train import curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LOSSES = {2: 5.0, 4: 4.0, 5: 3.0, 6: 3.5, 8: 3.2}  # validation losses by step, of which the fifth's is the best


def command(capsys, *argv) -> dict:
    assert cli.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def steps(run: Path) -> list[int]:
    return [runs.step_of(path) for path in runs.checkpoints(run / "checkpoints")]


def weights(source, step=None) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in convert.open_checkpoint(source, step).tensors.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A run of 8 steps, validated at each, whose fifth was the best: (directory, result, weights after each step)."""
    run, after = tmp_path_factory.mktemp("runs") / "overfitted", {}

    def validated(self):
        step = self.metrics.last["step"]
        after[step] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return {"valid_loss": LOSSES.get(step, 6.0)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "validated", validated)
        result = train.run(options(run, steps=8, save_every=4, valid_every=1, keep=1))
    return run, result, after


def test_the_best_and_the_last_are_kept_and_the_best_is_exported(overfitted):
    run, result, after = overfitted
    assert steps(run) == [5, 8]  # though only every fourth step is saved by rule
    assert result["exported"] == {"step": 5, "valid_loss": 3.0}
    assert json.loads((run / "export" / "training.json").read_text()) == result["exported"]
    assert same(weights(result["export"]), after[5]) and not same(after[5], after[8])


def test_a_run_stands_for_its_best_checkpoint_and_step_and_last_for_others(overfitted, tmp_path):
    run, _, after = overfitted
    model = igpt.ImageGPT.from_pretrained(run)
    assert same(dict(model.named_parameters()), after[5]) and model.trained == (5, 3.0)
    assert model.palette == igpt.Palette.load(run / "palette.npy")
    assert same(weights(run, 8), after[8]) and same(weights(run, "last"), after[8])
    shutil.copytree(run / "checkpoints" / "step-8", tmp_path / "alone")  # a checkpoint needs no run around it
    alone = igpt.ImageGPT.from_pretrained(tmp_path / "alone")
    assert same(dict(alone.named_parameters()), after[8]) and alone.palette == model.palette
    for source, step, said in (
        (run, 7, r"step: .* no whole checkpoint of step 7, only of \[5, 8\]"),
        (run, "best", "step: got 'best', expected None, a step or 'last'"),
        (run / "export", 5, "step: got 5, but .*export is no run directory"),
    ):
        with pytest.raises(ValueError, match=said):
            convert.open_checkpoint(source, step)


def test_a_damaged_checkpoint_is_passed_over_and_without_any_the_export_stands(overfitted, tmp_path):
    run, after = tmp_path / "run", overfitted[2]
    shutil.copytree(overfitted[0], run)
    best = run / "checkpoints" / "step-5"
    shard = next(best.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.warns(UserWarning, match=r"step-5 is not taken: .* has \d+ bytes of \d+"):
        assert same(weights(run), after[8])
    with pytest.raises(ValueError, match=r"step-5: .* has \d+ bytes of \d+"):
        weights(best)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(ValueError, match=r"distcp, byte \d+: not a tensor"):
        weights(run)
    for path in runs.checkpoints(run / "checkpoints"):
        shutil.rmtree(path)
    assert same(weights(run), after[5])
    shutil.rmtree(run / "export")
    with pytest.raises(ValueError, match="has no whole checkpoint yet"):
        weights(run)


class Shell:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_pickle_of_a_checkpoint_is_executed(overfitted, tmp_path):
    """Neither the metadata nor what stands where a tensor should."""
    checkpoint = tmp_path / "step-5"
    shutil.copytree(overfitted[0] / "checkpoints" / "step-5", checkpoint)
    evil, shard = Shell(f"touch {tmp_path}/executed"), next(checkpoint.glob("*.distcp"))
    torch.save(evil, tmp_path / "evil.pt")
    shard.write_bytes((tmp_path / "evil.pt").read_bytes().ljust(shard.stat().st_size, b"\0"))
    with pytest.raises(ValueError, match="not a tensor"):
        weights(checkpoint)
    metadata = checkpoint / ".metadata"
    for content in (pickle.dumps(evil), b"", b"junk", pickle.dumps({"state_dict_metadata": 1})):
        metadata.write_bytes(content)
        (checkpoint / "files.json").write_text(json.dumps({".metadata": len(content)}))
        with pytest.raises(ValueError, match=r"\.metadata: not a checkpoint's"):
            weights(checkpoint)
    assert not (tmp_path / "executed").exists()


def test_killed_in_mid_run_every_program_takes_the_run(tmp_path, capsys):
    run = tmp_path / "run"
    child = children.start(children.train_here, options(run, steps=10_000, save_every=5000, valid_every=2))
    children.wait_for(lambda: (run / "checkpoints" / "latest").is_file(), child)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    best = runs.Trained.of(runs.resolve(run))
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
    pictures = [tmp_path / "0.png", tmp_path / "1.png"]
    drawn = command(capsys, "sample", "--model", run, "--n", 1, "--out", tmp_path / "sample.png", "--device", "cpu")
    assert drawn["pictures"] == 1 and (tmp_path / "sample.png").is_file()
    told = command(capsys, "complete", "--model", run, "--last", "--completions", 1, "--out", tmp_path / "complete.png",
                   "--pictures", *pictures)  # fmt: skip
    assert told["kept_pixels"] == 32
    emoji = ("--data", "builtin:emoji", "--device", "cpu")
    command(capsys, "eval", "--model", run, "--limit", 2, *emoji)
    limits = ("--limit-train", 40, "--limit-test", 4)
    command(capsys, "probe", "--model", run, "--only", 1, "--C", 0.1, *limits, *emoji)
    command(capsys, "finetune", "--model", run, "--epochs", 1, "--batch", 8, *limits, *emoji)
    assert command(capsys, "info", "--model", run)["trained"] == best._asdict()
    where = ("--out", tmp_path / "hf", "--format", "hf")
    converted = command(capsys, "convert", "--source", run, "--step", best.step, *where)
    assert converted["trained"] == best._asdict()
    assert same(weights(tmp_path / "hf"), weights(run))


def test_stopped_before_any_validation_the_last_checkpoint_stands(tmp_path):
    child = children.start(children.train_until, options(tmp_path / "run", valid_every=100), 1)
    child.join(120)
    assert child.exitcode == 0 and igpt.ImageGPT.from_pretrained(tmp_path / "run").trained == (2, None)


def test_weights_come_whole_out_of_the_checkpoint_of_two_processes(tmp_path):
    asked = options(tmp_path / "run", steps=2, valid_every=2)
    children.train_together(2, asked)
    assert len(list((tmp_path / "run" / "checkpoints" / "step-2").glob("*.distcp"))) == 2
    model = igpt.ImageGPT.from_pretrained(tmp_path / "run")
    valid = igpt.data.load("builtin:emoji", "valid", size=8).encoded(model.palette)
    tokens = torch.from_numpy(valid.tokens[:20].astype(np.int64))
    assert model.loss(tokens).item() == pytest.approx(model.trained.valid_loss, abs=1e-5)


def test_a_run_is_made_longer_and_cut_short(tmp_path, capsys):
    run = tmp_path / "run"
    first = train.run(options(run, steps=8))
    before = curve(run)
    longer = dataclasses.replace(options(run), steps=16)
    child = children.start(children.train_until, longer, 10)
    child.join(120)
    assert child.exitcode == 0 and steps(run)[-1] == 11
    capsys.readouterr()
    second = train.run(dataclasses.replace(longer, steps=13))
    said = "had 16 steps and now has 13: from its last checkpoint on the learning rate follows"
    assert said in capsys.readouterr().err
    assert (first["step"], second["step"]) == (8, 13)
    rows = [row for row in curve(run) if "loss" in row]
    assert curve(run)[: len(before)] == before and [row["step"] for row in rows] == list(range(1, 14))
    for row, length in zip(rows, [8] * 8 + [16] * 3 + [13] * 2):
        assert row["lr"] == pytest.approx(igpt_rate(row["step"], length)), row["step"]
    assert train.run(dataclasses.replace(longer, steps=4))["step"] == 13
    assert "is at step 13 already: nothing is trained" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"another configuration \(train\.lr: 0\.003 there, 0\.01 asked; train\.steps"):
        train.run(dataclasses.replace(longer, lr=0.01))


def igpt_rate(step: int, length: int, peak: float = 0.003) -> float:
    """The paper's: linear over the first tenth (of 1,669 pictures by 8: less than an epoch), then a cosine to 0."""
    warmup = length // 10
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + np.cos(np.pi * (step - 1 - warmup) / (length - warmup)))

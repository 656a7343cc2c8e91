"""Checkpoints: whole or not there, and an error that names the last good one."""

import resource
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import igpt
from igpt.programs import train
from igpt.training import checkpoint
from igpt.training.checkpoint import Checkpoints
from igpt.training.processes import Processes
from tests.children import options

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
ALONE = Processes(0, 1, torch.device("cpu"))


def trained(seed: int):
    """A model and its Adam after one step."""
    torch.manual_seed(seed)
    model = igpt.ImageGPT.from_preset("tiny", n_layer=1, width=32, n_ctx=16, vocab=32)
    torch.nn.init.normal_(model.head)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.loss(torch.randint(0, 32, (2, 16))).backward()
    optimizer.step()
    return model, optimizer


def same(one, other) -> bool:
    (model, optimizer), (model_, optimizer_) = one, other
    pairs = list(zip(model.parameters(), model_.parameters()))
    for p, p_ in list(pairs):
        pairs += [(optimizer.state[p][k], optimizer_.state[p_][k]) for k in ("step", "exp_avg", "exp_avg_sq")]
    return all(torch.equal(a, b) for a, b in pairs)


def saved(folder: Path, *steps: int, keep: int = 9) -> dict:
    """Checkpoints of `steps`, each of another state: {step: (model, optimizer)}."""
    checkpoints, states = Checkpoints(folder, ALONE, keep), {step: trained(step) for step in steps}
    for step, state in states.items():
        checkpoints.start(step, *state)
        checkpoints.poll(wait=True)
    return states


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: what a full disk does, to a process of root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_comes_back_and_old_ones_go(tmp_path):
    states = saved(tmp_path, 1, 2, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-2"]
    loaded = trained(99)
    assert Checkpoints(tmp_path, ALONE).load(*loaded) == 10
    assert same(loaded, states[10]) and not same(loaded, states[2])


def test_what_is_written_is_the_state_at_the_start(tmp_path):
    state, kept = trained(0), trained(0)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.start(1, *state)
    with torch.no_grad():
        for p in state[0].parameters():
            p.zero_()
            state[1].state[p]["exp_avg"].zero_()
    checkpoints.poll(wait=True)
    assert checkpoints.load(*state) == 1 and same(state, kept)


@pytest.mark.parametrize(
    "harm", ["truncated", "a file lost", "files.json lost", "files.json torn", "pointer to nowhere"]
)
def test_a_damaged_checkpoint_is_not_taken(tmp_path, harm):
    states = saved(tmp_path, 1, 2)
    newest, expected = tmp_path / "step-2", 1
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "a file lost":
        (newest / ".metadata").unlink()
    elif harm == "files.json lost":
        (newest / "files.json").unlink()
    elif harm == "files.json torn":
        (newest / "files.json").write_text("{")
    else:
        (tmp_path / "latest").write_text("step-77")
        expected = 2
    loaded = trained(99)
    with pytest.warns(UserWarning, match=r"step-\d+ is not taken: "):
        assert Checkpoints(tmp_path, ALONE).load(*loaded) == expected
    assert same(loaded, states[expected])


def test_a_damaged_checkpoint_displaces_no_whole_one(tmp_path):
    saved(tmp_path, 1, 9)
    (tmp_path / "step-9" / ".metadata").unlink()
    saved(tmp_path, 2, keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert Checkpoints(tmp_path, ALONE).latest() == tmp_path / "step-2"


def test_what_a_kill_left_behind_is_swept(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step-9-backup").mkdir()  # someone's copy: neither taken nor removed
    for name in (".writing-step-2", ".removing-step-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert Checkpoints(tmp_path, ALONE).latest() == tmp_path / "step-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-9-backup"]


def test_an_empty_folder_is_step_0(tmp_path):
    assert Checkpoints(tmp_path / "new", ALONE).load(*trained(0)) == 0


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    """The first checkpoint fits, the second doesn't."""
    begin = Checkpoints.start

    def start(self, step, *state):
        if step == 8:
            with largest_file(100_000):
                begin(self, step, *state)
                self.poll(wait=True)
        else:
            begin(self, step, *state)

    monkeypatch.setattr(Checkpoints, "start", start)
    said = r"checkpoint of step 8 could not be written in .*File too large; the last good one is .*step-4"
    with pytest.raises(OSError, match=said):
        train.run(options(tmp_path / "run"))
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "run" / "checkpoints", ALONE).latest().name == "step-4"
    assert train.run(options(tmp_path / "run"))["step"] == 12


def test_a_full_disk_at_the_metrics_is_named(tmp_path):
    with largest_file(7000), pytest.raises(OSError, match=r"metrics\.jsonl could not be written: .*File too large"):
        train.run(options(tmp_path / "run", steps=90, save_every=100, valid_every=100))


def test_an_unwritable_folder_is_named(tmp_path):
    saved(tmp_path / "checkpoints", 1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE)
    (tmp_path / "checkpoints" / ".writing-step-2").write_text("in the way")
    checkpoints.start(2, *trained(2))
    with pytest.raises(OSError, match=r"checkpoint of step 2 could not be .*last good one is .*step-1"):
        checkpoints.poll(wait=True)


def test_write_durably_leaves_the_old_text_until_the_new_is_whole(tmp_path):
    path = tmp_path / "latest"
    checkpoint.write_durably(path, "step-1")
    with largest_file(3), pytest.raises(OSError):
        checkpoint.write_durably(path, "step-20")
    assert path.read_text() == "step-1"

"""encode_folder: the same tokens whatever the workers, interruptions and kills; partial work is never a token set."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import igpt.data.encode
import igpt.data.workers
from igpt import Palette, data
from igpt.data.crops import square

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def palette() -> Palette:
    return Palette(np.random.default_rng(1).uniform(-1, 1, (64, 3)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(90):
        path = root / ("cat", "dog", "eel")[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (20 + i % 7, 24, 3), dtype=np.uint8)).save(path)
    return root


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


def encode(root, out, palette, **options):
    return igpt.data.encode.encode_folder(root, out, palette, 8, **{"workers": 0, "progress": False, **options})


def test_tokens_labels_and_meta(pictures, palette, tmp_path):
    meta = encode(pictures, tmp_path / "set", palette)["train"]
    assert (meta["rows"], meta["height"], meta["vocab"], meta["skipped"]) == (90, 8, 64, [])
    files = ["labels.npy", "meta.json", "palette.npy", "tokens.npy"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == files
    loaded = data.load(str(tmp_path / "set"), "train+valid")
    expected = np.stack([square(pictures / name, 8) for name in names(pictures)])
    assert np.array_equal(loaded.tokens, palette.encode(expected).numpy()) and loaded.size == (8, 8)
    assert loaded.classes == ("cat", "dog", "eel") and loaded.labels.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert loaded.palette == palette
    # And it is what loading the folder itself gives.
    assert np.array_equal(data.load(str(pictures), "train+valid", size=8).images, expected)


def test_workers_agree(pictures, palette, tmp_path, monkeypatch):
    monkeypatch.setattr(igpt.data.workers, "BATCH", 7)
    for workers in (0, 2):
        encode(pictures, tmp_path / str(workers), palette, crop="train", seed=5, workers=workers)
    tokens = [(tmp_path / name / "tokens.npy").read_bytes() for name in ("0", "2")]
    assert tokens[0] == tokens[1]
    encode(pictures, tmp_path / "other", palette, crop="train", seed=6)
    assert (tmp_path / "other" / "tokens.npy").read_bytes() != tokens[0]


CHILD = """
import sys
if __name__ == "__main__":
    from igpt import Palette
    from igpt.data import encode, workers as pool
    encode.SAVE_EVERY, pool.BATCH = 0.0, 2
    source, out, palette, workers = sys.argv[1:]
    encode.encode_folder(source, out, Palette.load(palette), 8, crop="train", workers=int(workers), progress=False)
"""


def children(pid: int) -> list[Path]:
    """/proc entries of a process's children."""
    return [Path("/proc") / child for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed(pictures, palette, tmp_path, monkeypatch, workers):
    """SIGKILL at two random places; then the set is bit for bit that of an unbroken run, and no worker is left."""
    script, out = tmp_path / "child.py", tmp_path / "set"
    script.write_text(CHILD)
    palette.save(tmp_path / "palette.npy")
    encode(pictures, tmp_path / "unbroken", palette, crop="train")
    command = [sys.executable, str(script), str(pictures), str(out), str(tmp_path / "palette.npy"), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(igpt.__file__).parents[1])}
    rng, killed, orphans = random.Random(workers), 0, []
    for share in (0.1, 0.5):
        goal = int(90 * share + rng.random() * 20)
        child = subprocess.Popen(command, env=environment)
        while child.poll() is None:
            done = json.loads((out / "progress.json").read_text())["done"] if (out / "progress.json").is_file() else 0
            if done >= goal:
                orphans += children(child.pid)
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.001)
        killed += child.wait() == -signal.SIGKILL
        if not (out / "meta.json").exists():
            with pytest.raises(ValueError, match="was not finished"):
                data.load(str(out))
    assert killed, "no child was killed before it was done"
    assert bool(orphans) == bool(workers)
    deadline = time.monotonic() + 20
    while (left := [path for path in orphans if path.exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    monkeypatch.setattr(igpt.data.workers, "BATCH", 2)  # as the children
    encode(pictures, out, palette, crop="train", workers=workers)
    for name in ("tokens.npy", "labels.npy"):
        assert (out / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert not (out / "progress.json").exists() and not (out / "tokens.npy.partial").exists()


@pytest.mark.parametrize("broken", ["seal", "replace", "finish"])
def test_killed_while_finishing(pictures, palette, tmp_path, monkeypatch, broken):
    """Whatever step of the end is cut short, the set isn't taken as whole, and a second call completes it."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        if broken == "replace":
            real = os.replace
            patch.setattr(os, "replace", lambda a, b: die() if str(b).endswith("tokens.npy") else real(a, b))
        else:
            patch.setattr(igpt.data.encode, broken, die)
        with pytest.raises(Killed):
            encode(pictures, out, palette)
    with pytest.raises(ValueError, match="was not finished"):
        data.load(str(out))
    encode(pictures, out, palette)
    assert len(data.load(str(out), "train+valid")) == 90
    before = (out / "tokens.npy").stat().st_mtime_ns
    assert encode(pictures, out, palette)["train"]["rows"] == 90
    assert (out / "tokens.npy").stat().st_mtime_ns == before, "finished work is not done again"


def interrupted(pictures, palette, out, monkeypatch, after: int = 3):
    """A run that stops after some batches of 4."""
    monkeypatch.setattr(igpt.data.workers, "BATCH", 4)
    real = igpt.data.workers.read_batch

    def stop(root, files, *rest):
        if files[0][0] >= 4 * after:
            raise KeyboardInterrupt
        return real(root, files, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(igpt.data.workers, "read_batch", stop)
        patch.setattr(igpt.data.encode, "SAVE_EVERY", 0.0)
        with pytest.raises(KeyboardInterrupt):
            encode(pictures, out, palette)


def test_torn_rows_are_cut_off(pictures, palette, tmp_path, monkeypatch):
    out = tmp_path / "set"
    interrupted(pictures, palette, out, monkeypatch)
    assert json.loads((out / "progress.json").read_text())["done"] == 12
    with open(out / "tokens.npy.partial", "ab") as file:
        file.write(b"\xff" * 333)
    encode(pictures, out, palette)
    encode(pictures, tmp_path / "unbroken", palette)
    assert (out / "tokens.npy").read_bytes() == (tmp_path / "unbroken" / "tokens.npy").read_bytes()


def test_lost_rows_mean_a_new_start(pictures, palette, tmp_path, monkeypatch):
    out = tmp_path / "set"
    interrupted(pictures, palette, out, monkeypatch)
    os.truncate(out / "tokens.npy.partial", 500)
    encode(pictures, out, palette)
    encode(pictures, tmp_path / "unbroken", palette)
    assert (out / "tokens.npy").read_bytes() == (tmp_path / "unbroken" / "tokens.npy").read_bytes()


def test_other_settings_are_refused(pictures, palette, tmp_path, monkeypatch):
    out = tmp_path / "set"
    interrupted(pictures, palette, out, monkeypatch)
    with pytest.raises(ValueError, match=r"holds other work, .*'seed': \(0, 1\)"):
        encode(pictures, out, palette, seed=1)
    encode(pictures, out, palette)
    with pytest.raises(ValueError, match=r"holds other work, .*'palette'"):
        encode(pictures, out, Palette(palette.centres[:32]))
    other = Palette(-palette.centres)
    for name in ("tokens.npy", "labels.npy", "palette.npy"):
        (tmp_path / name).mkdir()
        other.save(tmp_path / name / name)
        with pytest.raises(ValueError, match=rf"out: .* holds \['{name}'\] already, which are not this set's"):
            encode(pictures, tmp_path / name, palette)
        with pytest.raises(ValueError, match=rf"out: .* holds \['{name}'\] already"):
            data.save_tokens(data.load("builtin:emoji", "valid"), tmp_path / name, palette)
        assert Palette.load(tmp_path / name / name) == other
    (tmp_path / "own").mkdir()
    palette.save(tmp_path / "own" / "palette.npy")
    assert encode(pictures, tmp_path / "own", palette)["train"]["rows"] == 90


def test_unreadable_pictures(pictures, palette, tmp_path, monkeypatch):
    monkeypatch.setattr(igpt.data.workers, "BATCH", 8)
    root, out = tmp_path / "root", tmp_path / "set"
    for i, name in enumerate(names(pictures)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = (pictures / name).read_bytes()
        (root / name).write_bytes(content[:100] if i in (20, 21, 50) else content)
    with pytest.raises(ValueError, match=r"unreadable picture.*skip_bad leaves such pictures out"):
        encode(root, out, palette)
    with pytest.raises(ValueError, match="was not finished"):
        data.load(str(out))
    meta = encode(root, out, palette, skip_bad=True)["train"]
    assert meta["rows"] == 87 and meta["skipped"] == [names(root)[i] for i in (20, 21, 50)]
    loaded = data.load(str(out), "train+valid")
    good = [name for name in names(root) if name not in meta["skipped"]]
    assert np.array_equal(loaded.tokens, palette.encode(np.stack([square(root / name, 8) for name in good])).numpy())
    assert loaded.labels.tolist() == [("cat", "dog", "eel").index(name[:3]) for name in good]
    assert encode(root, out, palette, skip_bad=True)["train"]["skipped"] == meta["skipped"]


def test_nothing_readable(palette, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of its 1 pictures can be read"):
        encode(tmp_path / "root", tmp_path / "set", palette, skip_bad=True)


def test_splits(pictures, palette, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for part in ("train", "val", "test"):
        (root / part).symlink_to(pictures)
    metas = encode(root, tmp_path / "set", palette)
    assert {part: meta["rows"] for part, meta in metas.items()} == {"train": 90, "valid": 90, "test": 90}
    assert [len(data.load(str(tmp_path / "set"), split)) for split in ("train", "valid", "test")] == [90, 90, 90]
    meta = tmp_path / "set" / "test" / "meta.json"
    meta.write_text(meta.read_text().replace("eel", "owl"))
    with pytest.raises(ValueError, match=r"classes differ: .*eel.*owl"):
        data.load(str(tmp_path / "set"), "test")


def test_loose_pictures_are_encoded_without_labels(pictures, palette, tmp_path):
    root = tmp_path / "root"
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        (root / part / "cat").symlink_to(pictures / "cat")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "train" / "stray.png")
    assert encode(root, tmp_path / "set", palette)["train"]["rows"] == 31
    assert data.load(str(tmp_path / "set"), "test").labels.tolist() == [0] * 30
    with pytest.raises(ValueError, match=r"labels are missing: stray\.png lies beside"):
        data.load(str(tmp_path / "set")).labelled()


def test_bad_arguments(pictures, palette, tmp_path):
    for options, message in (
        ({"crop": "odd"}, "crop: got 'odd'"), ({"resample": "odd"}, "resample: got 'odd'"),
        ({"source": tmp_path / "absent"}, "source: .*absent is no folder"), ({"size": 0}, "size: got 0"),
        ({"seed": -1}, "seed: got -1"), ({"workers": -1}, "workers: got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            igpt.data.encode.encode_folder(**{"source": pictures, "out": tmp_path / "x", "palette": palette, **options})
    assert not (tmp_path / "x").exists()

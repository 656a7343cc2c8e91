"""A folder of a million pictures to tokens: bounded memory, all cores, resumable after SIGKILL.

Workers decode and crop; this process looks the colours up and appends to tokens.npy.partial, whose header stays blank
until the last picture is in: partial work is never a token set. progress.json, replaced atomically after the rows that
it counts are on disk, says where to go on; what lies behind them is cut off.
"""

import hashlib
import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from igpt.data.crops import CROPS, check_filter
from igpt.data.folder import check_classes, list_pictures, split_folders, warn_of_bad
from igpt.data.token_sets import check_room, finish, write_json
from igpt.data.workers import available_cores, check_counts, read_squares
from igpt.palette import Palette

SAVE_EVERY = 2.0  # seconds between progress files
HEADER = 128  # bytes of a .npy header of version 1.0, for any number of rows


def encode_folder(
    source, out, palette: Palette, size: int = 32, *, crop: str = "eval", resample: str = "bilinear", seed: int = 0,
    workers: int | None = None, skip_bad: bool = False, progress: bool = True,
) -> dict[str, dict]:
    """Encodes the pictures below `source` (subfolders are labels; train/, valid/, test/ are splits) into the token
    set `out`, which igpt.data.load reads. Returns the meta.json of each split, {"train": {...}, ...}.

    crop: "eval" and "train" are ImageNet's, "stretch" takes the whole picture; those that are size x size already stay.
    workers: processes (default: all cores; 0: threads of this one), started by spawn, so a script needs its `__main__`
    guard. Called again after any interruption it goes on where it was; with other settings it refuses. An unreadable
    picture raises ValueError naming it; with skip_bad it is left out and counted (meta["skipped"]). Memory: the names
    of the files, and a few tasks for each worker."""
    if crop not in CROPS:
        raise ValueError(f"crop: got {crop!r}, expected one of {sorted(CROPS)}")
    check_filter(resample)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size: got {size!r}, expected a positive integer")
    check_counts(seed=seed, workers=workers)
    source, out = Path(source), Path(out)
    if not source.is_dir():
        raise ValueError(f"source: {source} is no folder")
    workers = available_cores() if workers is None else workers
    how = {"size": size, "crop": crop, "resample": resample, "seed": seed}
    roots = split_folders(source)
    listed = {part: list_pictures(root) for part, root in roots.items()}
    metas = {}
    for part, files in listed.items():
        check_classes(files, listed["train"])
        job = Job(files.root, out if files.root == source else out / part, files.names, palette, how)
        state = job.run(workers, skip_bad, progress)
        warn_of_bad(files.root, state["skipped"], len(files))
        labels = files.labels
        if labels is not None:
            skipped = set(state["skipped"])
            labels = labels[[name not in skipped for name in files.names]]
        notes = {**job.settings, "skipped": state["skipped"], "unlabelled": files.unlabelled}
        metas[part] = finish(job.out, (size, size), state["rows"], labels, files.classes, palette, notes)
        job.progress.unlink(missing_ok=True)
    return metas


class Job:
    """The tokens.npy of one folder."""

    def __init__(self, root: Path, out: Path, names: list[str], palette: Palette, how: dict):
        self.root, self.out, self.names, self.palette, self.how = root, out, names, palette, how
        self.n_ctx = how["size"] ** 2
        self.tokens, self.partial, self.progress = (
            out / name for name in ("tokens.npy", "tokens.npy.partial", "progress.json")
        )
        # All that decides the tokens: an interrupted run goes on only under the same.
        listing = "\n".join(names).encode("utf-8", "surrogateescape")
        self.settings = {"source": str(root.resolve()), "files": len(names), **how,
                         "names": hashlib.sha256(listing).hexdigest(), "palette": palette.fingerprint}

    def run(self, workers: int, skip_bad: bool, progress: bool) -> dict:
        """Leaves tokens.npy whole; gives {"files": done, "rows": written, "skipped": [names]}."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = self.resume()
        if state["done"] < len(self.names):
            self.append(state, workers, skip_bad, progress)
        if state["rows"] == 0:
            raise ValueError(f"{self.root}: none of its {len(self.names)} pictures can be read")
        if self.partial.exists():
            seal(self.partial, state["rows"], self.n_ctx)
            os.replace(self.partial, self.tokens)
        return state

    def resume(self) -> dict:
        """Where to go on: at the start, where an interrupted run was, or at the end."""
        fresh = {"done": 0, "rows": 0, "skipped": []}
        earlier = next((p for p in (self.progress, self.out / "meta.json") if p.is_file()), None)
        if earlier is None:
            check_room(self.out, self.palette)
            return fresh
        then = json.loads(earlier.read_text(encoding="utf-8"))
        if differ := {key: (then.get(key), now) for key, now in self.settings.items() if then.get(key) != now}:
            raise ValueError(f"out: {self.out} holds other work, (there, asked for): {differ}; expected a new folder")
        if self.tokens.exists():
            return {"done": len(self.names), "rows": then["rows"], "skipped": then["skipped"]}
        if self.partial.exists() and self.partial.stat().st_size >= HEADER + then["rows"] * 2 * self.n_ctx:
            return {key: then[key] for key in fresh}
        return fresh

    def append(self, state: dict, workers: int, skip_bad: bool, progress: bool) -> None:
        """Encodes the files that are left, in order, keeping `state` and progress.json up to date."""
        batches = read_squares(self.root, self.names, range(state["done"], len(self.names)), workers, **self.how)
        bar = tqdm(total=len(self.names), initial=state["done"], unit="picture", unit_scale=True, desc=self.root.name,
                   disable=not progress)
        with bar, open(self.partial, "r+b" if self.partial.exists() else "w+b") as file:
            # Keeps a blank header and the recorded rows; rows behind those may be torn.
            file.truncate(HEADER + state["rows"] * 2 * self.n_ctx)
            file.seek(0, os.SEEK_END)
            self.save(file, state)
            saved = time.monotonic()
            for count, images, bad in batches:
                if bad and not skip_bad:
                    self.save(file, state)
                    raise ValueError(f"{bad[0][1]} (skip_bad leaves such pictures out)")
                file.write(self.palette.table(images).astype("<u2").tobytes())
                state["done"] += count
                state["rows"] += len(images)
                state["skipped"] += [name for name, _ in bad]
                bar.update(count)
                bar.set_postfix(skipped=len(state["skipped"]), refresh=False)
                if time.monotonic() - saved > SAVE_EVERY:
                    self.save(file, state)
                    saved = time.monotonic()
            self.save(file, state)

    def save(self, file, state: dict) -> None:
        file.flush()
        os.fsync(file.fileno())
        write_json(self.progress, {**self.settings, **state})


def seal(path: Path, rows: int, n_ctx: int) -> None:
    """Writes the .npy header that makes the file whole."""
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({rows}, {n_ctx}), }}".ljust(HEADER - 11) + "\n"
    with open(path, "r+b") as file:
        file.truncate(HEADER + rows * n_ctx * 2)
        file.write(b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.encode())
        file.flush()
        os.fsync(file.fileno())

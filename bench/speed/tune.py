"""Search tiles on the GPU at hand and print the rows to paste into kernels/tiles.py: `python -m bench.speed.tune`.

First every candidate is compiled, on all cores and without the GPU (`python -m bench.compiled --cases
bench.speed.tune`): what spills or doesn't fit is out before it costs time. What is left is timed against the table's
own row, in turns, and must give what the table's row gives. Nothing searches in the call path.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import rows
from bench.cases import Case, sized
from bench.compiled.cases import CompileCase, forward_and_backward
from bench.machine import ended, raised, stamp
from bench.speed.measure import Run, call, timers, together
from bench.speed.peers import Absent
from igpt.kernels import tiles
from igpt.kernels.device import ARCHS, arch
from igpt.kernels.tiles import Tile

PRESETS = ("s", "m", "l")
WARPS = (4, 8)


@dataclass(frozen=True)
class Search:
    """One row of one table: where it stands, the case that is timed, and the values tried."""

    table: str
    key: tuple | int
    case: Case
    values: dict

    @property
    def name(self) -> str:
        return f"{self.table} {self.key}"

    @property
    def current(self) -> Tile:
        """The table's own, or the portable one in its place."""
        table = getattr(tiles, self.table)
        return table[self.key] if self.key in table else table["portable", *self.key[1:]]

    def candidates(self) -> list[Tile]:
        """The table's own row first."""
        choices = (dict(zip(self.values, chosen)) for chosen in itertools.product(*self.values.values()))
        return list(dict.fromkeys([self.current, *(dataclasses.replace(self.current, **c) for c in choices)]))

    def using(self, tile: Tile):
        """As a context, or as a decorator."""
        return tiles.using(getattr(tiles, self.table), self.key, tile)


def searches(arch: str) -> Iterator[Search]:
    """The most valuable first: the presets' attention at 1024, then the head, the embedding, the norms."""
    blocks = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128), "num_warps": WARPS, "num_stages": (2, 3, 4)}
    stages = {"num_stages": (2, 3, 4, 5)}
    for forward, backward in zip(*(sized("attention", PRESETS, (x,), 32768) for x in ("fwd", "bwd"))):
        D = forward.D
        if arch == "sm_90":
            yield Search("ATTENTION_HOPPER_FORWARD", D, forward, stages)
            yield Search("ATTENTION_HOPPER_BACKWARD", D, backward, stages)
        else:
            keys = blocks | {"BLOCK_M": (32, 64, 128)}
            yield Search("ATTENTION_FORWARD", (arch, D), forward, blocks)
            yield Search("ATTENTION_DKDV", (arch, D), backward, keys)
            yield Search("ATTENTION_DQ", (arch, D), backward, blocks)
    blocks |= {"BLOCK_N": (128, 256), "BLOCK_K": (32, 64), "num_stages": (3, 4)}
    (head,), (table,) = sized("head_loss", "m", ("fwd",), 32768), sized("embed", "m", ("bwd",), 32768)
    yield Search("HEAD_LOSS", (arch, 2), head, blocks)
    yield Search("EMBEDDING_BACKWARD", (arch, 2), table, blocks | {"BLOCK_N": (64, 128)})
    rows_of = {"BLOCK_M": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8, 16)}
    for table, direction in (("NORM_FORWARD", "fwd"), ("NORM_BACKWARD", "bwd")):
        for width, case in zip((512, 1024, 2048), sized("norm", PRESETS, (direction,), 32768)):
            yield Search(table, (arch, width), case, rows_of)


def this_arch() -> str:
    return arch(torch.device("cuda"))


def cases() -> Iterator[CompileCase]:
    """Every candidate of every search, for bench.compiled; its name is the search's and its place in it."""
    for machine in ARCHS:
        for search in searches(machine):
            for place, tile in enumerate(search.candidates()):
                run = search.using(tile)(forward_and_backward)
                yield CompileCase(f"{search.name}#{place}", functools.partial(run, search.case), archs=(machine,))


def clean(arch: str, only: str, limit_s: float) -> set[str]:
    """The candidates that compile without a spill, by name, from a process without a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    flags = ["--cases", "bench.speed.tune", "--case", only, "--arch", arch, "--workers", str(os.cpu_count() or 1)]
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        command = [sys.executable, "-m", "bench.compiled", *flags, "--out", file.name]
        ended(command, limit_s, env, stdout=sys.stderr)
        found = rows.read(file.name)
    return {row.case for row in found if row.ok} - {row.case for row in found if not row.ok}


def agree(a, b) -> bool:
    """Two tilings sum in another order: they may differ by a few roundings of the dtype, no more."""
    return all(
        (x.float() - y.float()).abs().max() <= 8 * torch.finfo(x.dtype).eps * y.float().abs().max().clamp(min=1)
        for x, y in zip(a, b)
    )


def timed(search: Search, tried: Callable[[str], bool], run: Run) -> list[tuple[float, Tile]]:
    """(ms, tile) of every candidate that is to be tried, runs, and agrees with the table's row, quickest first."""
    inputs, now, *others = search.case.inputs(run.device), *search.candidates()
    wanted = search.using(now)(search.case.answers)("triton", inputs)
    found = {"ours": now}  # it must run, or there is nothing to compare with
    found |= {name: tile for i, tile in enumerate(others, 1) if tried(name := f"{search.name}#{i}")}

    def build(name, case, device):
        using = search.using(found[name])
        if not agree(using(case.answers)("triton", inputs), wanted):
            raise Absent("it gives something else")
        return using(using(call)(case.ours("triton"), inputs, case.diff, case.direction))

    ranked = []
    for row in together("kernels", [(name, search.case) for name in found], build, {}, run):
        print(f"  {found[row.impl]}: {row}", file=sys.stderr)
        ranked += [(row.median_ms, found[row.impl])] if row.median_ms else []
    return sorted(ranked, key=lambda x: x[0])


def paste(search: Search, ranked: list[tuple[float, Tile]], device: str) -> str:
    """The row for kernels/tiles.py: the best where it beats the table's own by 2% or more, else the table's own."""
    now = search.current
    mine = next(ms for ms, tile in ranked if tile == now)
    best_ms, best = ranked[0]
    if best_ms > 0.98 * mine:
        best_ms, best = mine, now
    gpu, note = stamp(device)["gpu"].removeprefix("NVIDIA "), f"{best_ms:.4f} ms, the table's {mine:.4f}"
    best = dataclasses.replace(best, evidence=f"{gpu} {datetime.date.today().isoformat()}")
    shown = [str(v) for v in (best.BLOCK_M, best.BLOCK_N, best.BLOCK_K) if v]
    for f in dataclasses.fields(Tile):
        value = getattr(best, f.name)
        shown += [f"{f.name}={value!r}"] if value != f.default and not f.name.startswith("BLOCK") else []
    return f"    {search.key!r}: Tile({', '.join(shown)}),  # {note}"


def search(chosen: Iterable[Search], tried: Callable[[str], bool], run: Run, out: Path) -> None:
    """Until the run's time is over; the rows to paste go to stdout and to the end of `out`."""
    for search in chosen:
        if (left := run.deadline - time.monotonic()) < 5:
            print(f"no time was left for {search.name} and what follows", file=sys.stderr)
            break
        try:
            run.case_s = min(run.case_s, left / 2)
            line = f"{search.table}  {paste(search, timed(search, tried, run), run.device).strip()}"
        except Exception as fault:
            line = f"{search.name}: {raised(fault)}"
        print(line, flush=True)
        with out.open("a") as file:
            print(line, file=file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", default="", help="only tables whose name and key contain this")
    parser.add_argument("--out", type=Path, default=Path("tiles.txt"), help="append the rows to paste to this file")
    args = parser.parse_args(argv)
    run = Run("cuda", *timers("cuda"), case_s=10.0, deadline=time.monotonic() + args.seconds, least=10)
    tried = clean(this_arch(), args.only, args.seconds / 3)
    search([s for s in searches(this_arch()) if args.only in s.name], tried.__contains__, run, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

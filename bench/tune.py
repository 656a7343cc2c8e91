"""Search tiles on the GPU at hand and print the rows to paste into kernels/tiles.py: `python -m bench.tune`.

First every candidate is compiled, on all cores and without the GPU: what spills or doesn't fit is out before it costs
time. What is left is timed against the table's own row, in turns, and must give what the table's row gives.
Nothing searches in the call path.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from bench import cases, compile_cases, rows
from bench.cases import Case
from bench.machine import FAULTS, ROOT, stamp
from bench.measure import call
from bench.timing import CpuTimer, CudaTimer, interleaved
from igpt.kernels import tiles
from igpt.kernels.device import ARCHS, arch
from igpt.kernels.tiles import Tile

WARPS, STAGES = (4, 8), (2, 3, 4)
PRESETS = ("s", "m", "l")


@dataclass(frozen=True)
class Search:
    """One row of one table: where it stands, the kernel whose launches it shapes, the case that is timed, and the
    values tried. A key of one number is that of a table of sm_90 alone."""

    table: str
    key: tuple | int
    kernel: str
    case: Case
    values: dict

    @property
    def name(self) -> str:
        return f"{self.table} {self.key}"

    def row_key(self, arch: str):
        return (arch, *self.key) if isinstance(self.key, tuple) else self.key

    def current(self, arch: str) -> Tile:
        table, key = getattr(tiles, self.table), self.row_key(arch)
        return table[key] if key in table else table["portable", *self.key]

    def candidates(self, arch: str) -> list[Tile]:
        """The table's own row first."""
        now, choices = self.current(arch), itertools.product(*self.values.values())
        return list(dict.fromkeys([now, *(dataclasses.replace(now, **dict(zip(self.values, c))) for c in choices)]))

    @contextlib.contextmanager
    def using(self, tile: Tile, arch: str):
        with mock.patch.dict(getattr(tiles, self.table), {self.row_key(arch): tile}):
            yield


def searches(arch: str) -> Iterator[Search]:
    """The most valuable first: the presets' attention at 1024, then the head, the embedding, the norms."""
    blocks = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 128), "num_warps": WARPS, "num_stages": STAGES}
    for preset in PRESETS:
        H, D = cases.shapes(preset)
        case = Case("attention", 32, 1024, H, D, "bf16", preset=preset)
        backward = dataclasses.replace(case, direction="bwd")
        if arch == "sm_90":
            stages = {"num_stages": (2, 3, 4, 5)}
            yield Search("ATTENTION_HOPPER", D, "attention_hopper_kernel", case, stages)
            yield Search("ATTENTION_HOPPER_BACKWARD", D, "attention_hopper_backward_kernel", backward, stages)
            continue
        yield Search("ATTENTION_FORWARD", (D,), "attention_forward_kernel", case, blocks)
        case = backward
        yield Search("ATTENTION_DKDV", (D,), "attention_dkdv_kernel", case, blocks | {"BLOCK_M": (32, 64, 128)})
        yield Search("ATTENTION_DQ", (D,), "attention_dq_kernel", case, blocks)
    H, D = cases.shapes("m")
    blocks |= {"BLOCK_N": (128, 256), "BLOCK_K": (32, 64), "num_stages": (3, 4)}
    case = Case("head_loss", 32, 1024, H, D, "bf16", direction="fwd", preset="m")
    yield Search("HEAD_LOSS", (2,), "head_loss_kernel", case, blocks)
    case = Case("embed", 32, 1024, H, D, "bf16", direction="bwd", preset="m")
    yield Search("EMBEDDING_BACKWARD", (2,), "table_backward_kernel", case, blocks | {"BLOCK_N": (64, 128)})
    for table, kernel, direction in (
        ("NORM_FORWARD", "norm_forward_kernel", "fwd"), ("NORM_BACKWARD", "norm_backward_kernel", "bwd"),
    ):  # fmt: skip
        for preset, width in (("s", 512), ("m", 1024), ("l", 2048)):
            case = Case("norm", 32, 1024, *cases.shapes(preset), "bf16", direction=direction, preset=preset)
            yield Search(table, (width,), kernel, case, {"BLOCK_M": (1, 2, 4, 8, 16), "num_warps": (2, 4, 8, 16)})


def this_arch() -> str:
    return arch(torch.device("cuda"))


def compile_jobs(search: Search, arch: str) -> list:
    """Jobs of every candidate, whose case names the search and the candidate's place in it."""
    from bench.compile import plan

    jobs = []
    for place, tile in enumerate(search.candidates(arch)):
        with search.using(tile, arch):
            case = dataclasses.replace(search.case, B=1)
            run = functools.partial(compile_cases.forward_and_backward, case)
            found, _ = plan([compile_cases.CompileCase(f"{search.name}#{place}", run)], [arch])
        jobs += [job for job in found if job.launch.name == search.kernel]
    return jobs


def compile_all(arch: str, out: Path, only: str) -> None:
    from bench.compile import compile_all as compiling

    jobs = [job for search in searches(arch) if only in search.name for job in compile_jobs(search, arch)]
    with out.open("a", buffering=1) as file:
        for row in compiling(jobs, os.cpu_count() or 1, limit_s=60):
            print(rows.to_json(row), file=file)


def clean(arch: str, only: str, limit_s: float) -> dict[str, set[int]]:
    """For each search the places of the candidates that compile without a spill, from a process without a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        command = [sys.executable, "-m", "bench.tune", "--compile-only", "--arch", arch, "--only", only]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, "--out", file.name], cwd=ROOT, env=env, timeout=limit_s, stdout=sys.stderr)
        read = rows.read(file.name)
    spoilt, found = {row.case for row in read if not row.ok}, {}
    for case in {row.case for row in read} - spoilt:
        name, place = case.split("#")
        found.setdefault(name, set()).add(int(place))
    return found


def answers(search: Search, inputs: dict, tile: Tile, arch: str):
    with search.using(tile, arch):
        args = {k: v.detach().requires_grad_(k in search.case.diff) for k, v in inputs.items()}
        out = search.case.ours("triton")(**args)
        grads = torch.autograd.grad(out, [args[k] for k in search.case.diff], torch.ones_like(out))
    return [out.detach(), *grads]


def agree(a, b) -> bool:
    """Two tilings sum in another order: they may differ by a few roundings of the dtype, no more."""
    return all(
        (x.float() - y.float()).abs().max() <= 8 * torch.finfo(x.dtype).eps * y.float().abs().max().clamp(min=1)
        for x, y in zip(a, b)
    )


def timed(
    search: Search, arch: str, device: str, places: set[int], timer, seconds: float
) -> list[tuple[float, Tile]]:
    """(ms, tile) of every candidate that runs and agrees with the table's row, quickest first."""
    inputs = search.case.inputs(device)
    candidates = search.candidates(arch)
    wanted = answers(search, inputs, candidates[0], arch)
    variants = {}
    for place, tile in enumerate(candidates):
        if place and place not in places:
            continue
        try:
            if not agree(answers(search, inputs, tile, arch), wanted):
                continue
            with search.using(tile, arch):
                fn = call(search.case.ours("triton"), inputs, search.case.diff, search.case.direction)

            def variant(fn=fn, tile=tile):
                with search.using(tile, arch):
                    return fn()

            variant()
            variants[tile] = variant
        except FAULTS as fault:
            print(f"  {tile}: {type(fault).__name__}", file=sys.stderr)
    first = interleaved(variants, timer, seconds / 2, least=3, most=10)
    best = sorted(first, key=lambda t: first[t].median)[:4]
    last = interleaved({t: variants[t] for t in {*best, candidates[0]}}, timer, seconds / 2, least=5, most=50)
    return sorted(((s.median, t) for t, s in last.items()), key=lambda x: x[0])


def paste(search: Search, arch: str, ranked: list[tuple[float, Tile]], device: str) -> str:
    """The row for kernels/tiles.py: the best where it beats the table's own by 2% or more, else the table's own."""
    now = search.current(arch)
    mine = next(ms for ms, tile in ranked if tile == now)
    best_ms, best = ranked[0]
    if best_ms > 0.98 * mine:
        best_ms, best = mine, now
    gpu, note = stamp(device)["gpu"].removeprefix("NVIDIA "), f"{best_ms:.4f} ms, the table's {mine:.4f}"
    best = dataclasses.replace(best, evidence=f"{gpu} {datetime.date.today().isoformat()}")
    defaults = {f.name: f.default for f in dataclasses.fields(Tile)}
    options = {k: v for k, v in dataclasses.asdict(best).items() if v != defaults[k] and not k.startswith("BLOCK")}
    shown = [f"{k}={v!r}" for k, v in options.items()]
    sizes = [str(v) for v in (best.BLOCK_M, best.BLOCK_N, best.BLOCK_K) if v]
    return f"    {search.row_key(arch)!r}: Tile({', '.join([*sizes, *shown])}),  # {note}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--only", default="", help="only tables whose name and key contain this")
    parser.add_argument("--arch", choices=ARCHS, help="with --compile-only; otherwise the GPU's")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: what compiles clean, as JSON")
    parser.add_argument("--rehearse", action="store_true", help="one small search on a CPU, in the interpreter")
    parser.add_argument("--out", type=Path, help="append the rows to paste (or the JSON lines) to this file")
    args = parser.parse_args(argv)
    if args.compile_only:
        compile_all(args.arch or "sm_90", args.out or Path("/dev/stdout"), args.only)
        return 0
    start = time.monotonic()
    device = "cpu" if args.rehearse else "cuda"
    arch, timer = ("portable", CpuTimer()) if args.rehearse else (this_arch(), CudaTimer())
    chosen = [s for s in searches(arch) if args.only in s.name]
    places = {} if args.rehearse else clean(arch, args.only, args.seconds / 3)
    if args.rehearse:
        case = dataclasses.replace(chosen[-1].case, B=1, N=16, dtype="fp32")
        chosen = [dataclasses.replace(chosen[-1], case=case, values={"BLOCK_M": (1, 2)})]
        places = {chosen[0].name: {0, 1, 2}}

    def say(line: str) -> None:
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                print(line, file=file)

    for done, search in enumerate(chosen):
        left = args.seconds - (time.monotonic() - start)
        if left < 5:
            print(f"no time was left for {', '.join(s.name for s in chosen[done:])}", file=sys.stderr)
            break
        share = 0.1 if args.rehearse else min(10.0, left / 2)
        try:
            found = timed(search, arch, device, places.get(search.name, set()), timer, share)
            say(f"{search.table}  {paste(search, arch, found, device).strip()}")
        except FAULTS as fault:
            say(f"{search.name}: raised {type(fault).__name__}: {str(fault)[:200]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

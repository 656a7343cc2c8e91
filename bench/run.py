"""Correctness, then speed, then compiler evidence, on the machine at hand: `python bench/run.py --suite quick`.

Writes rows.jsonl (as it goes), report.md and plots to --out; the last line of stdout is one JSON object. Exit 0 only
if every correctness row holds and everything that sm_90 would run compiles clean; what is red has no speed.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    # Run as a file, Python puts bench/ first, whose names (compile, rows, ...) are no top-level modules.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench import cases, rows  # noqa: E402
from bench.cases import Case  # noqa: E402
from bench.compiled import step  # noqa: E402
from bench.log import Log  # noqa: E402
from bench.speed import measure, models, peers, pictures, sampling  # noqa: E402

SUITES = ("quick", "kernels", "model", "sampling", "compile", "full")
QUICK = ("--arch", "sm_90", "--quick")  # of what is compiled


def evidence(log: Log, device: str, suite: str) -> None:
    """Correctness and compilation, side by side on a CPU's two cores: neither is timed."""
    children, only = [], {"quick": ["--list", "quick"], "sampling": ["--op", "decode"]}
    if suite != "compile":
        flags = ["--device", device, *only.get(suite, [])]
        children.append(functools.partial(log.child, "correctness", *flags, interpret=device == "cpu"))
    if suite in ("quick", "compile", "full"):
        flags = ["--workers", str(max(1, min(8, (os.cpu_count() or 1) - len(children))))]
        children.append(functools.partial(log.child, "compiled", *flags, *QUICK * (suite == "quick")))
    with ThreadPool(len(children)) as pool:
        pool.map(lambda child: child(), children)


def speeds(args, log: Log) -> None:
    """Operations, whole models and sampling, as the suite wants them."""
    gpu, quick, suite = args.device == "cuda", args.suite == "quick", args.suite
    left = args.budget - (time.monotonic() - log.start)
    case_s, least = 2.0 if quick or gpu else 5.0, 2 if quick else 3
    run = log.prepared(args.device, left, peers=args.peers, case_s=case_s, least=least)
    if suite in ("quick", "model", "full"):
        for rows_of in () if gpu else pictures.QUICK if quick else pictures.ALL:
            log.take(rows_of(run))
        # In bf16 the quick suite compares with Hugging Face alone, to end in time.
        keep = (lambda name, c: c.dtype == "fp32" or name in ("ours", "hugging face")) if quick else (lambda *_: True)
        vits = [] if quick else cases.vit_cases(args.device, args.dtype)
        log.take(models.rows([*whole(args), *vits], run, keep))
    if suite in ("quick", "kernels", "full"):
        presets, lengths, dtypes = args.preset, args.seq, args.dtype
        directions, T = ("fwd", "bwd") if gpu else ("fwd", "fwd+bwd"), 65536 if gpu else lengths[0]
        if quick:
            run.peers = run.peers if gpu else ("eager",)
            presets, lengths, dtypes, directions = presets[:1], lengths[:1], dtypes[:1], ("fwd",)
        log.take(measure.operations(cases.speed(presets, lengths, dtypes, directions, T), run))
    if suite in ("sampling", "full"):
        run.peers, run.case_s = args.peers, 4.0
        log.take(sampling.rows(sampling.groups(args.device, args.preset), run))


def whole(args) -> list[Case]:
    """Whole-model cases: on a GPU forward and training step; on a CPU of one picture forward and loss with gradients,
    and, but in the quick suite, a training step of the tiny preset."""
    gpu, found = args.device == "cuda", []
    for N, dtype in itertools.product(args.seq, args.dtype):
        if not gpu and args.suite != "quick":
            found += cases.sized("model", ("tiny",), ("step",), 16 * N, N, dtype)
        directions, T = ("fwd", "step" if gpu else "fwd+bwd"), 32768 if gpu else N
        found += cases.sized("model", args.preset, directions, T, N, dtype)
    return found


def some(*known) -> Callable[[str], list]:
    """Of a flag's text: values of `known`, with commas between them."""

    def parse(text: str) -> list:
        asked = [type(known[0])(x) for x in text.split(",")]
        if bad := [x for x in asked if x not in known]:
            raise argparse.ArgumentTypeError(f"got {bad}, expected some of {list(known)}")
        return asked

    return parse


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--preset", type=some("s", "m", "l", "xl", "tiny"), help="default: s; s,m,l on a GPU")
    parser.add_argument("--seq", type=some(1024, 2304, 4096), help="default: 1024; all on a GPU")
    parser.add_argument("--dtype", type=some(*cases.DTYPES), help="default: fp32,bf16; bf16 on a GPU")
    parser.add_argument("--peers", type=some("all", *peers.NAMES), default="all", help="all, or some by name")
    parser.add_argument("--budget", type=float, help="seconds; cases past it are not timed (default: quick 200)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    parser.add_argument("--baseline", type=Path, help="earlier rows.jsonl to compare with")
    args = parser.parse_args(argv)
    if args.budget is None:
        args.budget = 200.0 if args.suite == "quick" else float("inf")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got cuda, but this torch sees no GPU")
    wide = args.device == "cuda" and args.suite != "quick"
    args.preset = args.preset or (["s", "m", "l"] if wide else ["s"])
    args.seq = args.seq or ([1024, 2304, 4096] if wide else [1024])
    args.dtype = args.dtype or (["bf16"] if args.device == "cuda" else ["fp32", "bf16"])
    if "all" in args.peers:
        args.peers = peers.NAMES
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    log, suite, extra = Log(args.out), args.suite, ""
    log.say(f"suite {suite} on {args.device}")
    evidence(log, args.device, suite)
    speeds(args, log)
    for preset in {"quick": ("s",), "full": ("s", "m", "l")}.get(suite, ()):
        for row in step.account(preset, 32, 1024):
            rows.append(row, log.path)
    if args.baseline:
        lines = rows.regressions(log.rows(), rows.read(args.baseline))
        extra = "\n".join(["## Against the baseline", "", *(f"- {line}" for line in lines or ["no row in common"])])
    return log.report(extra)


if __name__ == "__main__":
    sys.exit(main())

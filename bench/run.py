"""Correctness, then speed, then compiler evidence, on the machine at hand: `python bench/run.py --suite quick`.

Writes rows.jsonl (as it goes), report.md and plots to --out; the last line of stdout is one JSON object. Exit 0 only
if every correctness row holds and everything that sm_90 would run compiles clean; what is red has no speed.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    # Run as a file, Python puts bench/ first, whose names (compile, rows, ...) are no top-level modules.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench import cases, gate, measure, peers, pictures, report, rows, whole  # noqa: E402
from bench.models import ModelCase  # noqa: E402

SUITES = ("quick", "kernels", "model", "sampling", "compile", "full")
FATAL_ARCHS = ("sm_90",)


class Log:
    """The run's rows: appended to rows.jsonl as they come, and progress on stderr."""

    def __init__(self, out: Path, fresh: bool = True):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.start = out / "rows.jsonl", time.monotonic()
        self.path.open("w" if fresh else "a").close()
        self.broken: list[str] = []
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def take(self, found: Iterable) -> None:
        for row in found:
            with self.path.open("a") as file:
                print(rows.to_json(row), file=file)
            took = f"{row.median_ms:.3g} ms" if row.median_ms else row.note
            against = "".join(f", {ratio:.2f}x {peer}" for peer, ratio in row.ratios.items())
            self.say(f"{row.op} {row.case} {row.impl}: {took}{against}")

    def rows(self) -> list:
        return rows.read(self.path)


def start(log: Log, module: str, *arguments: str, interpret: bool = False) -> subprocess.Popen:
    """`python -m bench.<module>` beside us, appending its rows to ours: kernels decide at import whether they are to
    be interpreted or compiled, so each needs a process of its own. What it prints goes to stderr."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    log.say(f"bench.{module} {' '.join(arguments)}")
    command = [sys.executable, "-m", f"bench.{module}", *arguments, "--out", str(log.path)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=sys.stderr)


def finish(log: Log, module: str, process: subprocess.Popen) -> None:
    """0 is green and 1 is red, which its rows say; anything else is a death that left no row."""
    if (code := process.wait()) not in (0, 1):
        log.broken.append(f"bench.{module} ended with exit code {code}")


def evidence(log: Log, device: str, quick: bool, correct: bool, compiled: bool) -> None:
    """Correctness and compilation, side by side on a CPU's two cores: neither is timed."""
    running, cores = [], os.cpu_count() or 1
    flags = ["--quick"] if quick else []
    if correct:
        process = start(log, "correctness", "--device", device, *flags, interpret=device == "cpu")
        running.append(("correctness", process))
    if compiled:
        workers = max(1, min(8, cores - 1 if correct else cores))
        chosen = ["--arch", "sm_90"] if quick else []
        running.append(("compile", start(log, "compile", "--workers", str(workers), *chosen, *flags)))
    for module, process in running:
        finish(log, module, process)


def prepared(log: Log, device: str, seconds: float, peers: str, quick: bool = False) -> measure.Run:
    """A Run of so many seconds that knows which operations are red, and how far each is from fp64."""
    red, errors = set(), {}
    for row in log.rows():
        if isinstance(row, rows.Row) and row.suite == "correctness":
            if not row.ok:
                red.add(measure.subject(row))
            elif row.err_vs_fp64 is not None:
                known = errors.get((row.op, row.dtype), (0.0, 0.0))
                errors[row.op, row.dtype] = max(known, (row.err_vs_fp64, row.eager_err_vs_fp64))
    if any(name.startswith("bench.correctness") for name in log.broken):
        red |= set(itertools.product(cases.OPS, cases.DTYPES))
    return measure.Run(
        device, *measure.timers(device), peers=peers, case_s=2.0 if quick or device == "cuda" else 5.0,
        deadline=time.monotonic() + seconds, red=frozenset(red), errors=errors, least=2 if quick else 3,
    )  # fmt: skip


def speeds(args, device: str, log: Log) -> None:
    """Operations and whole models, as the suite wants them."""
    gpu, quick = device == "cuda", args.suite == "quick"
    run = prepared(log, device, args.budget - (time.monotonic() - log.start), args.peers, quick)
    presets, lengths, dtypes = args.preset, args.seq, args.dtype
    if args.suite in ("quick", "model", "full"):
        if not gpu:
            for rows_of in pictures.QUICK if quick else pictures.ALL:
                log.take(rows_of(run))
        chosen = models(presets, lengths, dtypes, gpu, quick)
        # In bf16 the quick suite compares with Hugging Face alone, to end in time.
        keep = (lambda name, c: c.dtype == "fp32" or name in ("ours", "hugging face")) if quick else (lambda *_: True)
        log.take(whole.whole(chosen, run, keep))
    if args.suite in ("quick", "kernels", "full"):
        if quick:
            run.peers = "eager" if not gpu else run.peers
            chosen = cases.speed(presets[:1], lengths[:1], dtypes[:1], ("fwd",), 65536 if gpu else 1024)
        else:
            directions = ("fwd", "bwd") if gpu else ("fwd", "fwd+bwd")
            chosen = cases.speed(presets, lengths, dtypes, directions, 65536 if gpu else lengths[0])
        log.take(measure.operations(chosen, run))


def models(presets, lengths, dtypes, gpu: bool, quick: bool) -> list[ModelCase]:
    """Whole-model cases: on a GPU forward and training step; on a CPU of one picture forward and loss with gradients,
    and, but in the quick suite, a training step of the tiny preset."""
    directions = ("fwd", "step") if gpu else ("fwd", "fwd+bwd")
    T = 32768 if gpu else 0
    steps = [] if gpu or quick else [ModelCase("tiny", 16, N, dtype, "step") for N in lengths for dtype in dtypes]
    return steps + [
        ModelCase(preset, max(1, T // N), N, dtype, direction)
        for preset in presets
        for N in lengths
        for direction in directions
        for dtype in dtypes
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--preset", help="of s,m,l (default: s on a CPU, all on a GPU)")
    parser.add_argument("--seq", help="of 1024,2304,4096 (default: 1024 on a CPU, all on a GPU)")
    parser.add_argument("--dtype", help="of fp32,bf16,fp16 (default: fp32,bf16 on a CPU, bf16 on a GPU)")
    parser.add_argument("--peers", default="all", help=f"all, or some of {', '.join(peers.NAMES)}")
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
    known = {"preset": ("s", "m", "l", "xl", "tiny"), "seq": (1024, 2304, 4096), "dtype": tuple(cases.DTYPES)}
    usual = {
        "preset": "s,m,l" if wide else "s",
        "seq": "1024,2304,4096" if wide else "1024",
        "dtype": "bf16" if args.device == "cuda" else "fp32,bf16",
    }
    for name, allowed in known.items():
        asked = [type(allowed[0])(x) for x in (getattr(args, name) or usual[name]).split(",")]
        if bad := [x for x in asked if x not in allowed]:
            parser.error(f"--{name}: got {bad}, expected some of {list(allowed)}")
        setattr(args, name, asked)
    try:
        peers.chosen({}, args.peers)
    except ValueError as error:
        parser.error(f"--peers: {error}")
    return args


def failures(log: Log) -> list[str]:
    """What makes the run red, by name."""
    found = list(log.broken)
    for row in log.rows():
        if isinstance(row, rows.CompileRow):
            if not row.ok and (row.arch in FATAL_ARCHS or "failed" in row.note or "raised" in row.note):
                found.append(f"compile {row.function} {row.case} {row.arch} {row.tile}: {row.note}")
        elif isinstance(row, rows.Row) and not row.ok:
            found.append(f"{row.suite} {row.op} {row.case} {row.impl}: {row.note}")
    compiled = [row for row in log.rows() if isinstance(row, rows.CompileRow)]
    return found + (gate.compare(compiled, gate.read()) if compiled else [])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    log = Log(args.out)
    suite, device = args.suite, args.device
    if suite != "compile":
        log.say(f"suite {suite} on {device}")
    wants = {
        "correct": suite in ("quick", "kernels", "model", "full"),
        "compiled": suite in ("quick", "compile", "full"),
    }
    evidence(log, device, suite == "quick", **wants)
    if suite in ("quick", "kernels", "model", "full"):
        speeds(args, device, log)
    if suite in ("sampling", "full"):
        left = max(0.0, args.budget - (time.monotonic() - log.start))
        flags = ["--device", device, "--peers", args.peers, "--budget", str(left), "--preset", *args.preset]
        finish(log, "sampling", start(log, "sampling", *flags))
    if suite in ("quick", "full"):
        flags = ["--preset", "s"] if suite == "quick" else []
        finish(log, "step", start(log, "step", *flags))
    found, failed = log.rows(), failures(log)
    extra = ""
    if args.baseline:
        ratios, slower = rows.regressions(found, rows.read(args.baseline))
        lines = [f"{' '.join(key)}: {ratio:.2f}x the earlier time" for key, ratio in ratios.items()]
        extra = "\n".join(["## Against the baseline", "", *(f"- {line}" for line in lines or ["no row in common"]), ""])
        extra += "\n".join(["Regressions:", *(f"- {line}" for line in slower)]) if slower else "No regression."
    path = report.write(found, failed, args.out, extra)
    for title, text in report.sections(found, markdown=False):
        print(f"\n{title}\n{text}")
    if extra:
        print(f"\n{extra}")
    print(json.dumps({"ok": not failed, "rows": len(found), "failed": failed, "report": str(path)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

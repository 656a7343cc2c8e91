"""Everything that needs a GPU, in under nine minutes, most valuable first: `make gpu`, or `python -m bench.gpu`.

Each stage is a process of its own with a share of the time: one that crashes or hangs costs its share and no more, and
rows are in rows.jsonl as soon as they are measured. First all kernels are compiled, on every core: that fills Triton's
cache, so that the GPU waits for no compiler. `--rehearse` runs every stage on a CPU, small, with a clock that lies.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import cases, checks, correctness, measure, report, sampling, tune, whole
from bench.cases import Case
from bench.machine import ROOT
from bench.models import ModelCase
from bench.run import Log, failures, prepared
from igpt.kernels.interpreter import INTERPRETED

PRESETS, LENGTHS = ("s", "m", "l"), (1024, 2304, 4096)
TOKENS = 65536  # of an operation's case
STEP_TOKENS = 32768  # of a training step
GRACE_S = 10.0  # past its time before a stage is ended


@dataclass(frozen=True)
class Job:
    """What a stage gets: where its rows go, its seconds, and whether this is a rehearsal."""

    log: Log
    seconds: float
    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def run(self, peers: str = "all") -> measure.Run:
        run = prepared(self.log, self.device, self.seconds, peers)
        return dataclasses.replace(run, case_s=0.3, least=5) if not self.rehearse else rehearsed(run)

    def operations(self, chosen: list[Case], peers: str = "all") -> None:
        if self.rehearse:
            small = {"B": 1, "N": 16, "H": 1, "D": 16, "dtype": "fp32", "preset": ""}
            chosen = list(dict.fromkeys(dataclasses.replace(c, **small) for c in chosen))
        self.log.take(measure.operations(chosen, self.run(peers)))

    def models(self, chosen: list[ModelCase], peers: str) -> None:
        run = self.run(peers)
        if self.rehearse:
            chosen = [ModelCase("tiny", 1, 64, "fp32", c.direction) for c in chosen[:1]]
        else:
            run = dataclasses.replace(run, case_s=2.0, least=3)
        self.log.take(whole.whole(chosen, run))


class LyingTimer:
    """A clock that a rehearsal can afford: calls are made, each takes a millisecond."""

    def __init__(self):
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def __call__(self, fn: Callable) -> float:
        fn()
        self.now += 1e-3
        return 1.0


def rehearsed(run: measure.Run) -> measure.Run:
    return dataclasses.replace(run, timer=LyingTimer(), step_timer=LyingTimer(), case_s=0.0, least=2)


def compiled(job: Job) -> None:
    """Fill Triton's cache with what the stages below launch on this GPU; the binaries' evidence comes with it."""
    arch = "sm_90" if job.rehearse else tune.this_arch()
    quick = ["--quick", "--case", "palette"] if job.rehearse else ["--cases", "bench.gpu_cases"]
    command = [sys.executable, "-m", "bench.compile", "--arch", arch, "--workers", str(os.cpu_count() or 1)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([*command, *quick, "--out", str(job.log.path)], cwd=ROOT, env=env, stdout=sys.stderr)


def correct(job: Job) -> None:
    chosen = cases.correctness(quick=job.rehearse, gpu=not job.rehearse)
    if job.rehearse:
        chosen = [dataclasses.replace(c, N=16) for c in chosen if c.D == 64 and c.causal]
    job.log.take(correctness.run(chosen, job.device, job.seconds - 20))
    size = (48, "tiny") if job.rehearse else (1024, "s")
    job.log.take([correctness.whole_model(job.device, "bf16", *size)])


def deterministic(job: Job) -> None:
    sizes = (1, 32, 1, 64) if job.rehearse else (4, 1024, 8, 64)
    chosen = [Case(op, *sizes, "bf16") for op in ("attention", *cases.ROW_OPS)]
    job.log.take(checks.determinism(chosen, job.device, runs=2 if job.rehearse else 20))
    job.log.take(checks.step(job.device))


def cold(job: Job) -> None:
    job.log.take(checks.first_step(job.device, "tiny" if job.rehearse else "s"))


def sanitized(job: Job) -> None:
    job.log.take(checks.sanitizer(job.seconds, "true" if job.rehearse else shutil.which("compute-sanitizer")))


def attention(job: Job) -> None:
    """Every head dim, forward and backward, at each length causal, then full. torch.compile adds nothing to SDPA."""
    sizes = [(N, True) for N in LENGTHS] + [(LENGTHS[0], False)]
    job.operations([
        Case("attention", max(1, TOKENS // N), N, *cases.shapes(preset), "bf16", causal, direction, preset)
        for N, causal in sizes for direction in ("fwd", "bwd") for preset in PRESETS
    ], "sdpa,sdpa cudnn,sdpa flash,sdpa efficient,flash-attn 4")  # fmt: skip


def others(job: Job) -> None:
    """MLP, head, palette and the rest, against everything but torch.compile, whose autotuning takes its time."""
    size = TOKENS // 1024, 1024
    ops = ("norm_mlp", "head_loss", "norm_linear", "embed", "norm")
    chosen = [
        Case(op, *size, *cases.shapes(preset), "bf16", True, direction, preset)
        for op in ops for preset in PRESETS for direction in ("fwd", "bwd", *(["fwd+bwd"] if op == "head_loss" else []))
    ]  # fmt: skip
    pixels = [Case(op, 4096, 1024, 1, 64, "fp32") for op in cases.PIXEL_OPS]
    job.operations([*chosen, *pixels], "torch path,liger")


def autotuned(job: Job) -> None:
    """What compiles for long: torch.compile max-autotune on the operations it could win, M first; FlexAttention."""
    size = TOKENS // 1024, 1024

    def chosen(ops: tuple[str, ...], presets: tuple[str, ...]) -> list[Case]:
        return [
            Case(op, *size, *cases.shapes(preset), "bf16", True, direction, preset)
            for preset in presets for op in ops for direction in ("fwd", "bwd")
        ]  # fmt: skip

    job.operations(chosen(("norm_mlp", "head_loss"), ("m",)), "torch.compile")
    job.operations(chosen(("attention",), PRESETS), "flex")
    job.operations(chosen(("norm_mlp", "head_loss"), ("s", "l")), "torch.compile")


def steps(job: Job) -> None:
    """Whole training steps against Hugging Face, the presets at 1024 first; then, at 1024, against torch.compile."""
    chosen = [ModelCase(preset, max(1, STEP_TOKENS // N), N, "bf16", "step") for N in LENGTHS for preset in PRESETS]
    job.models(chosen, "hugging face")
    if not job.rehearse:  # torch.compile would wait for a C++ compiler
        job.models(chosen[: len(PRESETS)], "torch.compile")


def sampled(job: Job) -> None:
    """Decoding: the ends of the range of batches first, against Hugging Face's generate."""
    chosen = sampling.groups("cuda", PRESETS)
    if job.rehearse:
        chosen = [[(name, sampling.DecodeCase("tiny", 1, 24, "fp32", steps=8)) for name in sampling.BUILD]]
    run = job.run("hugging face")
    if not job.rehearse:
        run = dataclasses.replace(run, case_s=1.0, least=2)
    job.log.take(sampling.rows(chosen, run, ("tiny",) if job.rehearse else PRESETS))


def searched(job: Job) -> None:
    """Tiles, with the time that is left."""
    argv = ["--seconds", str(job.seconds), *(["--rehearse"] if job.rehearse else [])]
    tune.main([*argv, "--out", str(job.log.path.with_name("tiles.txt"))])


@dataclass(frozen=True)
class Stage:
    run: Callable[[Job], None]
    seconds: float


# Seconds a stage may take; what one leaves, the later ones have.
STAGES = {
    "compiled": Stage(compiled, 50),
    "correct": Stage(correct, 70),
    "deterministic": Stage(deterministic, 20),
    "attention": Stage(attention, 75),
    "steps": Stage(steps, 95),
    "sampled": Stage(sampled, 45),
    "others": Stage(others, 35),
    "cold": Stage(cold, 35),
    "sanitized": Stage(sanitized, 25),
    "autotuned": Stage(autotuned, 45),
    "searched": Stage(searched, 1000),
}


def stage(name: str, log: Log, seconds: float) -> None:
    """One stage in its own process, ended when its time is over; its death is a line in the report."""
    flags = ["--stage", name, "--seconds", str(seconds), "--out", str(log.path.parent)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", *flags], cwd=ROOT, stdout=sys.stderr, start_new_session=True
    )
    try:
        code = process.wait(timeout=seconds + GRACE_S)
        if code:
            log.broken.append(f"stage {name} ended with exit code {code}")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.notes.append(f"stage {name}: ended at its time limit; its rows so far are kept")
        log.say(log.notes[-1])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520.0, help="of everything, or of the one stage")
    parser.add_argument("--stage", choices=list(STAGES), help="only this one, here; appends to --out's rows")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="some stages, in order")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, small, with a clock that lies")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("this torch sees no GPU; --rehearse runs the harness without one")
    if args.rehearse and not INTERPRETED:
        parser.error("--rehearse: expected TRITON_INTERPRET=1 in the environment, for it runs kernels")
    if args.stage:
        STAGES[args.stage].run(Job(Log(args.out, fresh=False), args.seconds, args.rehearse))
        return 0
    log = Log(args.out)
    end = time.monotonic() + args.seconds
    for name in args.only:
        seconds = min(STAGES[name].seconds, end - time.monotonic())
        log.say(f"stage {name}: {seconds:.0f} s")
        if seconds < 5:
            log.broken.append(f"stage {name}: no time was left")
        elif args.rehearse:
            STAGES[name].run(Job(log, seconds, True))
        else:
            stage(name, log, seconds)
        report.write(log.rows(), failures(log), args.out, "\n\n".join(log.notes))
    found, failed = log.rows(), failures(log)
    for title, text in report.sections(found, markdown=False):
        print(f"\n{title}\n{text}")
    path = report.write(found, failed, args.out, "\n\n".join(log.notes))
    print(json.dumps({"ok": not failed, "rows": len(found), "failed": failed, "report": str(path)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in two halves of at most four minutes each: `make gpu`, or `python -m bench.gpu`.

The first half says whether the kernels are right and what has not run yet is quick, the second times the rest; a repair
fits between them. Each stage is a process of its own with a share of the time: one that crashes or hangs costs its
share and no more, and rows are in rows.jsonl as soon as they are measured. First all kernels are compiled, on every
core, into a cache in --out, which serves the next half and, copied, the next machine.
"""

import argparse
import functools
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from bench.cases import DTYPES, PIXELS, RAGGED, ROW_OPS, Case, correctness, sized, speed, vit_cases
from bench.compiled import step
from bench.compiled.cases import CompileCase, decode_step, meta, of
from bench.compiled.cases import cases as compile_cases
from bench.correctness import checks
from bench.log import Log
from bench.machine import ROOT, ended
from bench.rows import Row, append
from bench.speed import measure, models, products, sampling, tune
from igpt import ImageGPT, ViT

PRESETS, LENGTHS = ("s", "m", "l"), (1024, 2304, 4096)
TOKENS, STEP_TOKENS = 65536, 32768  # of an operation's case, of a training step
GRACE_S = 10.0  # past its time before a stage is ended


@dataclass(frozen=True)
class Job:
    """What a stage gets: where its rows go, and its seconds."""

    log: Log
    seconds: float
    device: str = "cuda"

    def time(self, rows: Callable, chosen: Iterable, peers: Collection[str], case_s=0.3, least=5) -> None:
        """Rows of the cases, or of groups of them, beside some peers."""
        run = self.log.prepared(self.device, self.seconds, peers=peers, case_s=case_s, least=least)
        self.log.take(rows(chosen, run))

    def search(self, only: str) -> None:
        """Tiles, with the time that is left: the rows to paste are in tiles.txt."""
        tune.main(["--seconds", str(self.seconds), "--only", only, "--out", str(self.log.path.with_name("tiles.txt"))])


def compiled(job: Job) -> None:
    """Fill Triton's cache with what the stages below launch on this GPU; the binaries' evidence comes with it."""
    flags = ["--arch", tune.this_arch(), "--workers", str(os.cpu_count() or 1), "--cases", "bench.gpu"]
    job.log.child("compiled", *flags)


def correct(job: Job) -> None:
    """Every check of bench.correctness, in processes side by side."""
    parts = min(12, os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str((os.cpu_count() or 1) // parts)
    flags = ["--list", "gpu", "--limit", str(job.seconds - 15), "--part"]
    with ThreadPool(parts) as pool:
        pool.map(lambda part: job.log.child("correctness", *flags, str(part), str(parts)), range(parts))


def attention(job: Job) -> None:
    """Every head dim, forward and backward, at each length causal, then full. torch.compile adds nothing to SDPA."""
    chosen = [c for N in LENGTHS for c in sized("attention", PRESETS, ("fwd", "bwd"), TOKENS, N)]
    chosen += sized("attention", PRESETS, ("fwd", "bwd"), TOKENS, causal=False)
    job.time(measure.operations, chosen, ("sdpa", "sdpa cudnn", "sdpa flash", "sdpa efficient", "flash-attn 4"))


def gelu(job: Job) -> None:
    """quick-gelu's products: the vendor's with a pass, beside the Gluon candidates; then where no tile is whole."""
    chosen = sized("gelu", PRESETS, ("fwd", "bwd"), STEP_TOKENS)
    chosen += [Case("gelu", 1, 1001, 3, 88, direction=direction) for direction in ("fwd", "bwd")]
    job.time(products.rows, chosen, ())


def profiled(job: Job) -> None:
    """What a step's time is made of, kernel by kernel: profile.txt, beside what it should be made of."""
    for case in sized("model", PRESETS, ("step",), STEP_TOKENS):
        for row in step.account(case.preset, case.B, case.N):
            append(row, job.log.path)
        call = measure.warmed(models.build("ours", case, job.device))
        with torch.profiler.profile() as seen:
            for _ in range(3):
                call()
        table = seen.key_averages().table("self_device_time_total", row_limit=60, max_name_column_width=100)
        with job.log.path.with_name("profile.txt").open("a") as file:
            print(f"{case.preset}, {case.B} x {case.N}, {case.dtype}, of 3 steps\n{table}\n", file=file)


def steps(job: Job) -> None:
    """Whole training steps against Hugging Face and, at 1024, torch.compile; the presets at 1024 first."""
    first, *longer = (sized("model", PRESETS, ("step",), STEP_TOKENS, N) for N in LENGTHS)
    for chosen, peers in (
        (first, ("hugging face",)),
        (first, ("ours fp8",)),  # beside it Hugging Face would have memory for a picture or two of L
        (first, ("torch.compile", "torch.compile graphed")),
        (itertools.chain(*longer), ("hugging face",)),
    ):
        job.time(models.rows, chosen, peers, case_s=2.0, least=3)


def sampled(job: Job, presets: tuple[str, ...], *peers: str) -> None:
    """Decoding: the ends of the range of batches first, against Hugging Face's generate."""
    job.time(sampling.rows, sampling.groups("cuda", presets), peers, case_s=1.0, least=2)


def others(job: Job) -> None:
    """MLP, head, palette and the rest, against everything but torch.compile, whose autotuning takes its time."""
    job.time(measure.operations, PIXELS, ())  # their reference is numpy's: seconds a call, and 50 GB
    chosen = [case for op in ROW_OPS for case in sized(op, PRESETS, ("fwd", "bwd"), TOKENS)]
    job.time(measure.operations, [*chosen, *sized("head_loss", PRESETS, ("fwd+bwd",), TOKENS)], ("eager", "liger"))


def autotuned(job: Job) -> None:
    """What compiles for long: torch.compile on the operations it could win, M first; FlexAttention."""
    for presets in (("m",), ("s", "l")):
        chosen = [c for op in ("norm_mlp", "head_loss") for c in sized(op, presets, ("fwd", "bwd"), TOKENS)]
        job.time(measure.operations, chosen, ("torch.compile",))
    job.time(measure.operations, sized("attention", PRESETS, ("fwd", "bwd"), TOKENS), ("flex",))


def cases() -> Iterator[CompileCase]:
    """What the stages launch, for bench.compiled: the same cases, and so the same binaries; what comes first, first."""
    presets = speed(PRESETS, LENGTHS, ("bf16",), ("fwd+bwd",), TOKENS)
    for case in [*correctness(quick=False, gpu=True), *RAGGED, *presets, *PIXELS]:
        case = replace(case, B=64) if case.op == "attention" else case  # a small launch fills no ring, and is red
        yield of(case, Row("compile", impl="", **case.labels).case)
    ids, patches = meta(32, 1024).long(), meta(32, 224, 224, 3)
    for kind, name, *batch in [*((ImageGPT, name, ids) for name in PRESETS), (ViT, "vit-b16", patches, ids[:, 0])]:
        model = kind.from_preset(name, impl="triton", device="meta", dtype=torch.bfloat16)
        yield CompileCase(f"step {name}", functools.partial(step.launched, model, *batch))
    # A binary knows 1 picture, and 16 from a number that 16 does not divide.
    decoded = (1, "bf16", None), (1, "bf16", "int8"), *itertools.product((3, 16), ("bf16", "fp32"), (None,))
    for name, (B, dtype, weights) in itertools.product(PRESETS, decoded):
        run = functools.partial(decode_step, name, B, DTYPES[dtype], weights, dtype)
        yield CompileCase(f"decode {name} B{B} {weights or dtype}", run)
    yield from (case for case in compile_cases() if case.name.startswith(("gelu", "quantize")))


# Each stage and the seconds that it may take; what one leaves, the later ones have, and REST all that is left.
REST = 1000
HALVES: dict[str, dict[str, tuple[int, Callable[[Job], None]]]] = {
    "first": {
        "compiled": (50, compiled), "correct": (65, correct), "attention": (60, attention), "gelu": (15, gelu),
        "decoded": (15, lambda job: sampled(job, PRESETS[:1])), "profiled": (20, profiled),
        "attention_tiles": (REST, lambda job: job.search("ATTENTION")),
    },
    "second": {
        "steps": (75, steps), "sampled": (45, lambda job: sampled(job, PRESETS, "hugging face")),
        "others": (35, others), "pictures": (15, lambda job: job.time(
            models.rows, vit_cases("cuda", ["bf16"]), ("hugging face",), case_s=1.0, least=3)),
        "cold": (35, lambda job: job.log.take(checks.first_step(job.device, PRESETS[0]))),
        "autotuned": (30, autotuned), "sanitized": (20, lambda job: job.log.take(
            checks.sanitizer(job.device, job.seconds, shutil.which("compute-sanitizer")))),
        "other_tiles": (REST, lambda job: job.search("")),
    },
}  # fmt: skip
STAGES = HALVES["first"] | HALVES["second"]
HALF_S = 225.0


def stage(name: str, log: Log, seconds: float) -> None:
    """One stage in its own process, ended when its time is over; its death is a line in the report."""
    command = [sys.executable, "-m", "bench.gpu", "--stage", name, "--seconds", str(seconds), "--out", log.path.parent]
    code, _ = ended(command, seconds + GRACE_S, stdout=sys.stderr)
    if code is None:
        log.event(f"stage {name}", "ended at its time limit; its rows so far are kept", ok=True)
    elif code:
        log.event(f"stage {name}", f"ended with exit code {code}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--half", choices=list(HALVES), help="one half; the second reads the first's rows in --out")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), help="some stages, whose rows are appended")
    parser.add_argument("--seconds", type=float, default=HALF_S, help="of a half, or of the stages named")
    parser.add_argument("--stage", choices=list(STAGES), help="this one, in this process")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    if args.stage:
        STAGES[args.stage][1](Job(Log(args.out, fresh=False), args.seconds))
        return 0
    log = Log(args.out, fresh=not args.only and args.half != "second")
    os.environ["TRITON_CACHE_DIR"] = str(args.out.resolve() / "triton_cache")
    for names in [args.only] if args.only else [HALVES[h] for h in HALVES if args.half in (None, h)]:
        end = time.monotonic() + args.seconds
        for name in names:
            seconds = min(STAGES[name][0], end - time.monotonic())
            log.say(f"stage {name}: {seconds:.0f} s")
            if seconds < 5:
                log.event(f"stage {name}", "no time was left", ok=True)
            else:
                stage(name, log, seconds)
    return log.report()


if __name__ == "__main__":
    sys.exit(main())

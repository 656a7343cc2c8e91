"""Every kernel against fp64: `python -m bench.correctness`, in Triton's interpreter where there is no GPU.

The Triton path is compared with the reference in fp64, and with what the reference is off by in the case's own dtype:
the budget of budget.py, for the output and every gradient. Palettes must agree to the bit. On a GPU also: the
same bits in every run, a captured and a compiled step, and decoding against the full forward.
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import cases
from bench.cases import PIXEL_OPS, Case, tokens
from bench.correctness import checks
from bench.correctness.budget import Errors, against_fp64, compare
from bench.machine import ROOT, attempted
from bench.rows import Row, to_json
from bench.speed import models, sampling
from bench.speed.measure import blank
from bench.speed.models import ModelCase
from igpt.kernels import reference


def worst(errors: list[Errors]) -> tuple[float, float]:
    """Largest error of ours and of eager, each tensor's relative to its fp64 peak."""
    return max(e.ours_max / (e.peak or 1.0) for e in errors), max(e.eager_max / (e.peak or 1.0) for e in errors)


def judged(row: Row, errors: list[Errors]) -> Row:
    ours, eager = worst(errors)
    over = "; ".join(str(e) for e in errors if not e.ok)
    return dataclasses.replace(row, err_vs_fp64=ours, eager_err_vs_fp64=eager, ok=not over, note=over)


def check(case: Case, device: str, impl: str = "triton") -> Row:
    """The row of one case: red with the budget that broke, or with what was raised."""
    row = blank("correctness", impl, case, device)

    def exact():
        inputs = case.inputs(device)
        differ = int((case.ours(impl)(**inputs) != case.reference()(**inputs)).sum())
        note = f"{differ} differ of {case.B * case.N}" if differ else "bit-equal"
        return dataclasses.replace(row, ok=not differ, err_vs_fp64=float(differ), eager_err_vs_fp64=0.0, note=note)

    def budget():
        return judged(row, against_fp64(case.ours(impl), case.reference(), case.inputs(device), case.diff))

    return attempted(row, exact if case.op in PIXEL_OPS else budget)


def whole_model(case: ModelCase, device: str, impl: str = "triton") -> Row:
    """Loss of each pixel, and all gradients as one vector, of a whole model on real pictures."""
    row = blank("correctness", impl, case, device)

    def compared():
        model, ids = models.ours(case, device), tokens(case.B, case.N, device)
        model.impl = impl

        def nll(model):
            logits = models.eager_logits(model, ids)
            return F.cross_entropy(reference.wide(logits).flatten(0, 1), ids.flatten(), reduction="none")

        variants = (
            (model, lambda m: m.nll(m.trunk(ids), ids)), (model, nll), (copy.deepcopy(model).double(), nll),
        )  # fmt: skip
        losses, grads = [], []
        for m, loss in variants:
            losses.append(loss(m).flatten())
            found = torch.autograd.grad(losses[-1].mean(), list(m.parameters()))
            grads.append(torch.cat([g.flatten() for g in found]))
        return judged(row, [compare("nll", *(x.detach() for x in losses)), compare("gradients", *grads)])

    return attempted(row, compared)


LISTS = ("quick", "full", "gpu", "rehearsal", "sanitizer")


def listed(name: str, device: str) -> list[tuple[object, Callable[[], Row]]]:
    """(case, check) of each list, what speeds are shown of first: "quick" is bf16 at one length, "full" every dtype,
    both small enough for the interpreter; "gpu" is everything, at the lengths that count; "rehearsal" one check of each
    kind; "sanitizer" two cases of attention."""
    gpu, dtypes, widths, repeated = name == "gpu", ("bf16", "fp32"), (), []
    if name == "sanitizer":
        return [
            (case, functools.partial(check, case, device))
            for case in (Case("attention", 1, 160, 2, 64, "bf16", causal, "fwd+bwd") for causal in (True, False))
        ]
    if name == "rehearsal":
        found = [Case(op, 1, 16, 1, 16, "fp32", direction="fwd+bwd") for op in ("norm", "palette_encode")]
        dtypes, widths, repeated = ("fp32",), ("tiny",), found[:1]
    else:
        found = cases.correctness(name == "quick", gpu)
        dtypes = dtypes[:1] if name == "quick" else dtypes
    if gpu:
        widths = "s", "m", "l"
        repeated = [Case(op, 4, 1024, 8, 64, "bf16") for op in ("attention", *cases.ROW_OPS)]
    whole = [ModelCase(*(("s", 2, 1024) if gpu else ("tiny", 2, 48)), dtype, "fwd+bwd") for dtype in dtypes]
    checked = [(case, functools.partial(check, case, device)) for case in found]
    checked += [(case, functools.partial(whole_model, case, device)) for case in whole]
    for dtype, width, B in itertools.product(dtypes, widths, (3, 16) if gpu else (3,)):  # the kernels' two forms
        case = sampling.DecodeCase(width, B, 40, dtype)
        checked.append((case, functools.partial(sampling.check, width, device, dtype, B)))
    checked += [(case, functools.partial(checks.determinism, case, device, 20 if gpu else 2)) for case in repeated]
    for way in ("compiled", "CUDA graph") if widths else ():
        checked.append((whole[0], functools.partial(checks.step, way, device, 1024 if gpu else 64)))
    if widths:
        checked.append((whole[0], functools.partial(checks.graphed, device)))
    return checked


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--list", choices=LISTS, help="what is checked; default: gpu on a GPU, else full")
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side that share the list")
    parser.add_argument("--part", type=int, help="one process's: the list's places PART, PART + WORKERS, ...")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file as they come")
    args = parser.parse_args(argv)
    if args.workers > 1 and args.part is None:
        command = [sys.executable, "-m", "bench.correctness", *(sys.argv[1:] if argv is None else argv), "--part"]
        env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.workers))} | os.environ
        parts = [subprocess.Popen([*command, str(part)], cwd=ROOT, env=env) for part in range(args.workers)]
        codes = [part.wait() for part in parts]
        return next((code for code in codes if code not in (0, 1)), max(codes))
    start, rows = time.monotonic(), []
    chosen = listed(args.list or ("gpu" if args.device == "cuda" else "full"), args.device)
    chosen = [(case, check) for case, check in chosen if args.op in case.labels["op"]][args.part or 0 :: args.workers]
    for case, check in chosen:
        if time.monotonic() - start > args.limit:  # not dropped in silence: red
            row = dataclasses.replace(blank("correctness", "triton", case, args.device), ok=False, note="out of time")
        else:
            row = check()
        rows.append(row)
        errors = "" if row.err_vs_fp64 is None else f"{row.err_vs_fp64:.2e} (eager {row.eager_err_vs_fp64:.2e}) "
        verdict = f"{errors}{row.note}" if row.ok else f"RED {row.note}"
        print(f"[{len(rows)}/{len(chosen)}] {row.op} {row.case}: {verdict}", file=sys.stderr, flush=True)
        if args.out:
            with args.out.open("a") as out:
                print(to_json(row), file=out)
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel against fp64: `python -m bench.correctness`, in Triton's interpreter where there is no GPU.

The Triton path is compared with the reference in fp64, and with what the reference is off by in the case's own dtype:
the budget of bench/budget.py, for the output and every gradient. Palettes must agree to the bit.
"""

import argparse
import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import models
from bench.budget import Errors, against_fp64, compare
from bench.cases import PIXEL_OPS, Case, correctness, tokens
from bench.machine import FAULTS, stamp
from bench.models import ModelCase
from bench.rows import Row, to_json
from igpt.kernels import reference

SMALL = [Case("attention", 1, 160, 2, 64, "bf16", causal, "fwd+bwd") for causal in (True, False)]


def worst(errors: list[Errors]) -> tuple[float, float]:
    """Largest error of ours and of eager, each tensor's relative to its fp64 peak."""
    return max(e.ours_max / (e.peak or 1.0) for e in errors), max(e.eager_max / (e.peak or 1.0) for e in errors)


def check(case: Case, device: str, impl: str = "triton") -> Row:
    """The row of one case: red with the budget that broke, or with what was raised."""
    row = Row("correctness", impl=impl, **case.labels, **stamp(device))
    if case.op not in PIXEL_OPS:
        row = dataclasses.replace(row, direction="fwd+bwd")
    try:
        inputs = case.inputs(device)
        if case.op in PIXEL_OPS:
            differ = int((case.ours(impl)(**inputs) != case.reference()(**inputs)).sum())
            note = f"{differ} differ of {case.B * case.N}" if differ else "bit-equal"
            return dataclasses.replace(row, ok=not differ, err_vs_fp64=float(differ), eager_err_vs_fp64=0.0, note=note)
        errors = against_fp64(case.ours(impl), case.reference(), inputs, case.diff)
    except FAULTS as fault:
        return dataclasses.replace(row, ok=False, note=f"raised {type(fault).__name__}: {str(fault)[:300]}")
    return judged(row, errors)


def whole_model(device: str, dtype: str, N: int = 48, preset: str = "tiny", impl: str = "triton") -> Row:
    """Loss of each pixel, and all gradients as one vector, of a whole model on real pictures."""
    case = ModelCase(preset, 2, N, dtype, "fwd+bwd")
    row = Row("correctness", impl=impl, **case.labels, **stamp(device))
    ids = tokens(case.B, N, device)
    try:
        model = models.ours(case, device)
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
    except FAULTS as fault:
        return dataclasses.replace(row, ok=False, note=f"raised {type(fault).__name__}: {str(fault)[:300]}")
    return judged(row, [compare("nll", *(x.detach() for x in losses)), compare("gradients", *grads)])


def judged(row: Row, errors: list[Errors]) -> Row:
    ours, eager = worst(errors)
    over = "; ".join(str(e) for e in errors if not e.ok)
    return dataclasses.replace(row, err_vs_fp64=ours, eager_err_vs_fp64=eager, ok=not over, note=over)


def run(cases: list[Case], device: str, limit_s: float = float("inf")) -> Iterator[Row]:
    """Rows as they come; cases past the time limit are not dropped in silence: their rows are red."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > limit_s:
            yield Row("correctness", impl="triton", **case.labels, **stamp(device), ok=False, note="out of time")
        else:
            yield check(case, device)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="bf16 and one length only")
    parser.add_argument("--small", action="store_true", help="two cases of attention, for a sanitizer")
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file as they come")
    args = parser.parse_args(argv)
    listed = SMALL if args.small else correctness(args.quick, args.device == "cuda")
    chosen = [c for c in listed if args.op in c.op]
    rows, dtypes = [], () if args.small else ("bf16",) if args.quick else ("bf16", "fp32")
    whole = (whole_model(args.device, dtype) for dtype in dtypes if args.op in "model")
    total = len(chosen) + (len(dtypes) if args.op in "model" else 0)
    for row in itertools.chain(run(chosen, args.device, args.limit), whole):
        rows.append(row)
        verdict = f"{row.err_vs_fp64:.2e} (eager {row.eager_err_vs_fp64:.2e})" if row.ok else f"RED {row.note}"
        print(f"[{len(rows)}/{total}] {row.op} {row.case}: {verdict}", file=sys.stderr, flush=True)
        if args.out:
            with args.out.open("a") as out:
                print(to_json(row), file=out)
    return 0 if rows and all(r.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

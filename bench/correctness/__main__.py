"""Every kernel against fp64: `python -m bench.correctness`, in Triton's interpreter where there is no GPU.

The Triton path is compared with the reference in fp64, and with what the reference is off by in the case's own dtype:
the budget of budget.py, for the output and every gradient. Palettes must agree to the bit. On a GPU also: the
same bits in every run, a captured and a compiled step, and decoding against the full forward.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from bench import cases
from bench.cases import Case, model_case
from bench.correctness import checks
from bench.correctness.checks import Check, checked
from bench.rows import append


def listed(name: str, device: str) -> list[Check]:
    """The checks of each list, what speeds are shown of first: "quick" is bf16 at one length, "full" every dtype and
    decoding, both small enough for the interpreter; "gpu" is everything, at the lengths that count; "sanitizer" two
    cases of attention."""
    if name == "sanitizer":
        found = [Case("attention", 1, 160, 2, 64, "bf16", causal, "fwd+bwd") for causal in (True, False)]
        return [checked("triton", checks.operation, case, device) for case in found]
    quick, gpu = name == "quick", name == "gpu"
    found = [checked("triton", checks.operation, case, device) for case in cases.correctness(quick, gpu)]
    for dtype in ("bf16",) if quick else ("bf16", "fp32"):
        case = model_case(*(("s", 2, 1024) if gpu else ("tiny", 2, 48)), dtype, "fwd+bwd")
        found.append(checked("triton", checks.whole_model, case, device))
    if not quick:
        found += checks.decoding(device)
        for shape in ((4, 1024, 8, 64), (4, 1024, 16, 96)) if gpu else ((1, 77, 1, 64),):
            found.append(checked("triton", checks.in_fp8, Case("linear", *shape), device, op="fp8"))
    if gpu:
        found += [checked("triton", checks.operation, c, device, op="ragged attention") for c in cases.RAGGED]
        for op in ("attention", *cases.ROW_OPS):
            case = Case(op, 4, 1024, 8, 64, "bf16", direction="fwd+bwd")
            found.append(checked("triton, 20 runs", checks.determinism, case, device, 20))
        case = model_case("tiny", 1, 1024, "bf16", "fwd+bwd")
        found.append(checked("triton, compiled", checks.compiled, case, device, op="step"))
        case = model_case("tiny", 4, 1024, "fp32", "step")
        found.append(checked("triton, igpt.graphed", checks.graphed, case, device, op="step"))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.correctness", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    lists = ("quick", "full", "gpu", "sanitizer")
    parser.add_argument("--list", choices=lists, help="what is checked; default: gpu on a GPU, else full")
    parser.add_argument("--op", default="", help="only operations whose name contains this")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="place I, I + N, ... of the list alone")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file as they come")
    args = parser.parse_args(argv)
    start, rows = time.monotonic(), []
    chosen = listed(args.list or ("gpu" if args.device == "cuda" else "full"), args.device)
    chosen = [check for check in chosen if args.op in check.row.op][args.part[0] :: args.part[1]]
    for check in chosen:
        is_late = time.monotonic() - start > args.limit  # not dropped in silence: red
        row = dataclasses.replace(check.row, ok=False, note="out of time") if is_late else check()
        rows.append(row)
        append(row, args.out)
        print(f"[{len(rows)}/{len(chosen)}] {row}", file=sys.stderr, flush=True)
    return 0 if rows and all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel compiled for GPUs that aren't here: `python -m bench.compiled --arch sm_90`.

`--renew` (make compile-baseline) makes the gate's baseline anew, on purpose; look at its diff.
"""

import argparse
import importlib
import itertools
import sys
from pathlib import Path

from bench.compiled import gate
from bench.compiled.compile import TARGETS, compile_all, plan
from bench.report.report import binaries
from bench.rows import append


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose name contains this, such as an operation")
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="only the cases of the quick suite")
    parser.add_argument("--cases", default="bench.compiled.cases", help="the module whose cases() are compiled")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file as they come")
    parser.add_argument("--renew", action="store_true", help="the baseline of this Triton becomes what is compiled")
    args = parser.parse_args(argv)
    if args.renew and (args.case or args.quick or args.arch != list(TARGETS)):
        parser.error("--renew: got a selection of cases, expected all")
    cases = list(importlib.import_module(args.cases).cases())
    chosen = {c.name for c in cases if args.case in c.name and (c.quick or not args.quick)}
    # All are planned, whatever is chosen: a binary that several share has one name, which the gate knows it by.
    jobs, broken = plan(cases, args.arch)
    jobs = [job for job in jobs if job.cases & chosen]
    broken, rows = [row for row in broken if row.case in chosen], []
    for row in itertools.chain(broken, compile_all(jobs, args.workers)):
        rows.append(row)
        append(row, args.out)
        where = f"[{len(rows)}/{len(jobs) + len(broken)}] {row.kernel} {row.function} {row.case} {row.arch} {row.tile}"
        print(f"{where}: {row.verdict}", file=sys.stderr)
    if args.renew:
        print("\n".join(gate.compare(rows, gate.read())) or "nothing is worse than the old baseline")
        gate.renew(rows)
    elif not args.out:
        print(binaries(rows))
    return 0 if rows and all(r.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

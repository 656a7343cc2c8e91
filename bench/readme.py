"""The README's tables, made from committed rows: `python -m bench.readme` writes them, `--check` fails if they differ.

A table stands between `<!-- rows: PATH -->` and `<!-- end rows -->`, PATH being a rows.jsonl from the repository root.
"""

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

from bench import rows
from bench.report import columns, number

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- rows: (\S+) -->\n).*?(<!-- end rows -->)", re.S)
SUITES = ("model", "sampling")
SHOWN = ("hugging face", "hugging face fp32", "torch.compile")  # peers with a column of their own
OWN = "hugging face patched"  # ours again, in its clothes: a row, and no rival


def table(path: Path) -> str:
    """One line a case: our time, and how many times quicker it is than each peer in the same run."""
    found = [r for r in rows.read(path) if isinstance(r, rows.Row) and r.suite in SUITES and r.median_ms]
    if not found:
        raise ValueError(f"{path}: no timed rows of {SUITES}")
    cases: dict[tuple, dict[str, rows.Row]] = defaultdict(dict)
    for row in found:
        cases[row.op, row.case][row.impl] = row
    lines = []
    for (op, case), by_impl in cases.items():
        for impl, row in by_impl.items():
            if row.ratios:
                # A preset says how many heads it has, and how wide.
                name = f"{op} {re.sub(' H[0-9]+ D[0-9]+ d[0-9]+', '', case) if row.preset else case}"
                name += "" if impl == "ours" else f", {impl.removeprefix('ours').lstrip(', ')}"
                rate = f"{number(row.per_s)} {row.unit}" if row.per_s else ""
                against = [f"**{row.ratios[p]:.2f}x**" if p in row.ratios else "" for p in SHOWN]
                others = ", ".join(f"{r:.2f}x {p}" for p, r in row.ratios.items() if p not in (*SHOWN, OWN))
                lines.append([name, number(row.median_ms), rate, *against, others])
    one = found[0]
    head = ["case", "ms", "a second", *(f"vs {peer}" for peer in SHOWN), "and"]
    stamp = f"{one.gpu}; torch {one.torch}, Triton {one.triton}, commit {one.commit}, {one.date}. Medians, interleaved."
    return f"{columns(lines, head, markdown=True)}\n\n{stamp}\n"


def filled(text: str) -> str:
    """The README with every block made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(ROOT / m[2])}{m[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is not what its rows say")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text()
    new = filled(old)
    if args.check:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The README's tables, of committed rows: `python -m bench.report.readme` writes them, `--check` fails if they differ.

A table stands between `<!-- rows: PATH NAME -->` and `<!-- end rows -->`, PATH being a rows.jsonl from the repository
root and NAME one of TABLES.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench import rows
from bench.machine import ROOT
from bench.report.report import columns, number
from bench.rows import Row

BLOCK = re.compile(r"(<!-- rows: (\S+) (\S+) -->\n).*?(<!-- end rows -->)", re.S)
PEERS = ("hugging face", "hugging face fp32", "torch.compile")  # with a column of their own where cases are listed
PATCHED = "hugging face patched"  # ours again, in its clothes: a row, and no rival
DIRECTIONS = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both", "step": "step", "token": "token"}


def ratio(row: Row, peer: str, name: str = "") -> str:
    """How many times quicker ours is: a win in bold, a loss by its name, nothing where they did not meet."""
    if peer not in row.ratios:
        return ""
    x = round(row.ratios[peer], 2)
    return (f"**{x:.2f}x**" if x > 1 else f"{x:.2f}x") + name + (", a loss" if x < 1 else "")


def cases(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    """One line a case: our time, and how many times quicker it is than each peer in the same run."""
    lines = []
    for row in found:
        if row.ratios and row.suite in ("model", "sampling"):
            # A preset says how many heads it has, and how wide.
            name = f"{row.op} {re.sub(' H[0-9]+ D[0-9]+ d[0-9]+', '', row.case) if row.preset else row.case}"
            name += "" if row.impl == "ours" else f", {row.impl.removeprefix('ours').lstrip(', ')}"
            rate = f"{number(row.per_s)} {row.unit}" if row.per_s else ""
            others = ", ".join(f"{r:.2f}x {p}" for p, r in row.ratios.items() if p not in (*PEERS, PATCHED))
            lines.append([name, number(row.median_ms), rate, *(ratio(row, p) for p in PEERS), others])
    return ["case", "ms", "a second", *(f"vs {p}" for p in PEERS), "and"], lines


def grid(title: str, keep: Callable, line: Callable, column: Callable, cell: Callable) -> Callable:
    """A table of ours with a line and a column for each label that occurs, and `cell(row)` there, of all rows of that
    line and column joined."""

    def table(found: list[Row]) -> tuple[list[str], list[list[str]]]:
        order = list(DIRECTIONS)
        kept = sorted(
            (r for r in found if r.impl == "ours" and keep(r)),
            key=lambda r: (r.op, not r.causal, order.index(r.direction), r.N, r.B, r.d),
        )
        cells = rows.joined(kept, lambda r: (line(r), column(r)))
        names, heads = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
        return [title, *heads], [[n, *(cell(cells[n, h]) if (n, h) in cells else "" for h in heads)] for n in names]

    return table


def preset(row: Row) -> str:
    return row.preset.upper()


def listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


TABLES = {
    "cases": cases,
    "attention": grid(
        keep=lambda r: r.op == "attention" and r.suite == "kernels",
        line=lambda r: f"{DIRECTIONS[r.direction]}, {'causal' if r.causal else 'full'}, {r.N}",
        column=lambda r: f"{preset(r)}, D {r.D}",
        cell=lambda r: f"{number(r.tflops)} TFLOP/s, {ratio(r, 'sdpa cudnn')}; {ratio(r, 'sdpa flash')}",
        title="ours, against cuDNN; against FlashAttention-2",
    ),
    "operations": grid(
        keep=lambda r: r.suite == "kernels" and r.op != "attention" and r.preset,
        line=lambda r: f"{r.op} {DIRECTIONS[r.direction]}",
        column=preset,
        cell=lambda r: listed(f"{number(r.median_ms)} ms", ratio(r, "liger", " Liger")),
        title="65,536 tokens",
    ),
    "steps": grid(
        keep=lambda r: r.op == "model" and r.direction == "step",
        line=lambda r: f"{r.B} x {r.N}",
        column=preset,
        cell=lambda r: listed(
            f"{r.median_ms:.0f} ms", f"MFU {100 * r.mfu:.0f}%",
            *(ratio(r, peer, f" {peer}") for peer in ("hugging face", "torch.compile", "torch.compile graphed")),
        ),
        title="pictures x tokens",
    ),
    "sampling": grid(
        keep=lambda r: r.op == "decode" and r.N == 544,
        line=lambda r: f"{r.dtype}, batch {r.B}",
        column=preset,
        cell=lambda r: f"{number(r.median_ms)} ms, {number(r.per_s)} pictures/s, {r.pct_floor:.0f}% of the floor",
        title="a token of every picture",
    ),
}  # fmt: skip


def table(path: Path, name: str) -> str:
    """The table of that name from these rows, and a line that says where they come from."""
    timed = [r for r in rows.read(path) if isinstance(r, Row) and r.median_ms]
    head, lines = TABLES[name](timed)
    if not lines:
        raise ValueError(f"{path}: no timed rows for the table {name}")
    one, commits = timed[0], dict.fromkeys(r.commit for r in timed)
    stamp = f"{one.gpu}; torch {one.torch}, Triton {one.triton}, commit {', '.join(commits)}, {one.date}"
    stamp += ". Medians, interleaved."
    return f"{columns(lines, head, padded=False)}\n\n{stamp}\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is not what its rows say")
    args = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text()
    new = BLOCK.sub(lambda m: f"{m[1]}{table(ROOT / m[2], m[3])}{m[4]}", old)
    if args.check:
        return int(old != new)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

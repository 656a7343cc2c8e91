"""The report of a run, made from its rows alone: tables, as text and in report.md, and plots."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from math import fsum
from pathlib import Path

from bench.report import targets
from bench.rows import CompileRow, Row, StepRow, joined


def number(x: float | None, digits: int = 3) -> str:
    """Three figures that count, no exponent where a reader needs none."""
    if x is None:
        return "-"
    return f"{x:.{digits}g}" if abs(x) < 1000 else f"{x:.0f}"


def columns(rows: list[list[str]], head: list[str], padded: bool = True) -> str:
    """Nothing without rows."""
    lines = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines)]
    shown = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join(shown) if rows else ""


def correctness(rows: list[Row]) -> str:
    lines = [
        [r.op, r.case, number(r.err_vs_fp64), number(r.eager_err_vs_fp64), "ok" if r.ok else f"RED {r.note}"]
        for r in rows
    ]
    return columns(lines, ["operation", "case", "ours vs fp64", "eager vs fp64", "budget"])


def speed(rows: list[Row]) -> str:
    """One line a case: ours, then each peer's time and how many times quicker ours is."""
    cases: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for (*case, impl), r in joined(rows, lambda r: (
        # A sampling row's batch is its case; elsewhere a peer may have needed a smaller one.
        r.op, r.preset, r.suite == "sampling" and r.B, r.N, r.dtype, r.causal, r.direction, r.impl
    )).items():  # fmt: skip
        cases[tuple(case)][impl] = r
    lines = []
    for by_impl in cases.values():
        ours = by_impl.get("ours") or next(iter(by_impl.values()))
        elsewhere = [f"{x:.2f}x {name}" for name, x in ours.ratios.items() if name not in by_impl]
        for r in sorted(by_impl.values(), key=lambda r: r is not ours):
            ratio, note = ours.ratios.get(r.impl), ", ".join(filter(None, [r.note, *(elsewhere if r is ours else ())]))
            figures = (r.median_ms, 3), (r.pct_floor, 2), (r.tflops, 3), (r.per_s, 3), (r.mfu and 100 * r.mfu, 2)
            ms, *more = (number(*x) for x in (*figures, (r.peak_gb, 3), (r.err_vs_fp64, 3)))
            lines.append([r.op, r.case, r.impl, ms, f"{ratio:.2f}x" if ratio else "", *more, note])
    figures = ["ms", "ours is", "% of floor", "TFLOP/s", "per s", "MFU %", "peak GB", "err vs fp64"]
    return columns(lines, ["operation", "case", "impl", *figures, "note"])


BINARY = (
    "kernel", "function", "case", "arch", "tile", "regs", "stack", "shared", "occupancy", "mma", "tma", "waits",
    "exp2_under",
)  # fmt: skip


def binaries(rows: Iterable[CompileRow]) -> str:
    lines = []
    for row in sorted(rows, key=lambda r: (r.arch, *r.key)):
        shown = [f"{v:.3g}" if isinstance(v := getattr(row, c), float) else str(v) for c in BINARY]
        lines.append([*shown, row.verdict])
    return columns(lines, [*BINARY, "verdict"])


def step(rows: list[StepRow]) -> str:
    """One preset's step, and its sum."""
    first, lines = rows[0], []
    total = {f: fsum(getattr(r, f) for r in rows) for f in ("launches", "bytes", "flops", "floor_ms")}
    for r in [*rows, replace(first, kernel="total", vendor=False, **total)]:
        name = f"aten.{r.kernel}" if r.vendor else r.kernel
        lines.append([name, f"{r.launches:.0f}", f"{r.bytes / 1e9:.3f}", f"{r.flops / 1e12:.3f}", f"{r.floor_ms:.3f}"])
    title = f"iGPT-{first.preset.upper()}, {first.B} x {first.N} tokens, bf16, loss and backward"
    return columns(lines, [title, "launches", "GB", "TFLOP", "floor ms"])


def sections(rows: Iterable) -> dict[str, str]:
    """{title: text} of everything there are rows for."""
    kinds = defaultdict(list)
    for r in rows:
        kinds[r.suite].append(r)
    gpu = [r for r in rows if isinstance(r, Row) and r.device == "cuda"]
    steps = groupby(kinds["step"], key=lambda r: r.preset)
    found = {
        "Correctness: largest error, relative to each tensor's peak": correctness(kinds["correctness"]),
        "Whole models and pictures": speed(kinds["model"]),
        "Operations": speed(kinds["kernels"]),
        "Sampling": speed(kinds["sampling"]),
        "The run itself": columns([[r.op, r.note] for r in kinds["harness"]], ["what", "how it ended"]),
        "Numbers to reach on an H200 in bf16": gpu and columns(targets.verdicts(gpu), targets.HEAD),
        "Compiler evidence (compiled only: nothing here was timed)": binaries(kinds["compile"]),
        "What a training step is made of (counted; floors at an H200's ceilings, not timed)": "\n\n".join(
            step(list(some)) for _, some in steps
        ),
    }
    return {title: text for title, text in found.items() if text}


def plots(rows: Iterable, out: Path) -> list[Path]:
    """Bars of ours against each peer, one PNG a suite, where matplotlib is installed."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    from matplotlib.figure import Figure  # without pyplot no window system is asked for

    made = []
    for suite in ("model", "kernels", "sampling"):
        ours = [r for r in rows if isinstance(r, Row) and r.suite == suite and r.impl == "ours"]
        bars = [(f"{r.op} {r.case} vs {peer}", ratio) for r in ours for peer, ratio in r.ratios.items()][:60]
        if bars:
            figure = Figure(figsize=(9, 1 + 0.22 * len(bars)), layout="tight", dpi=110)
            axis = figure.add_subplot(xscale="log", xlabel="times as quick as the peer, same run")
            axis.barh(*zip(*bars))
            axis.axvline(1.0, color="black", linewidth=1)
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            made.append(out / f"{suite}.png")
            figure.savefig(made[-1])
    return made


def write(rows: list, failed: list[str], out: Path, extra: str = "") -> Path:
    """report.md and its plots in `out`."""
    lines = ["# Benchmark report", ""]
    for s in [r for r in rows if isinstance(r, Row)][:1]:
        lines += [f"{s.gpu}; torch {s.torch}, Triton {s.triton}, commit {s.commit}, {s.date}.", ""]
    lines += ["Everything that was checked holds." if not failed else "**Red:**", *(f"- {name}" for name in failed), ""]
    for title, text in sections(rows).items():
        lines += [f"## {title}", "", text, ""]
    lines += [f"![{path.stem}]({path.name})" for path in plots(rows, out)]
    path = out / "report.md"
    path.write_text("\n".join([*lines, extra, ""]))
    return path

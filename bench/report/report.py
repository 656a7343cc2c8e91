"""The report of a run, made from its rows alone: tables for the terminal, report.md, and plots."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from bench.compiled import compile as compiling
from bench.compiled import step
from bench.report import targets
from bench.rows import CompileRow, Row, StepRow, joined
from bench.tables import columns, number


def correctness(rows: list[Row], markdown: bool) -> str:
    lines = [
        [r.op, r.case, number(r.err_vs_fp64), number(r.eager_err_vs_fp64), "ok" if r.ok else f"RED {r.note}"]
        for r in rows
    ]
    return columns(lines, ["operation", "case", "ours vs fp64", "eager vs fp64", "budget"], markdown)


def speed(rows: list[Row], markdown: bool) -> str:
    """One line a case: ours, then each peer's time and how many times quicker ours is."""
    cases: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for r in rows:
        batch = r.B if r.suite == "sampling" else 0  # elsewhere a peer may have needed a smaller one
        by_impl = cases[r.op, r.preset, batch, r.N, r.dtype, r.causal, r.direction]
        by_impl[r.impl] = joined(by_impl.get(r.impl), r)
    lines = []
    for by_impl in cases.values():
        ours = by_impl.get("ours") or next(iter(by_impl.values()))
        lines.append([
            ours.op, ours.case, "ours", number(ours.median_ms), "", number(ours.pct_floor, 2),
            number(ours.tflops), number(ours.per_s), number(ours.mfu and 100 * ours.mfu, 2), number(ours.peak_gb),
            number(ours.err_vs_fp64), ours.note,
        ])  # fmt: skip
        for name, r in by_impl.items():
            if r is not ours:
                ratio = ours.ratios.get(name)
                lines.append([
                    "", f"B{r.B}" if r.B != ours.B else "", name, number(r.median_ms), f"{ratio:.2f}x" if ratio else "",
                    number(r.pct_floor, 2), number(r.tflops), number(r.per_s), number(r.mfu and 100 * r.mfu, 2),
                    number(r.peak_gb), "", r.note,
                ])  # fmt: skip
        if ratio := ours.ratios.get("hugging face fp32"):
            lines.append(["", "", "hugging face fp32", "", f"{ratio:.2f}x", *[""] * 6, "its default dtype"])
    head = ["operation", "case", "impl", "ms", "ours is", "% of floor", "TFLOP/s", "per s", "MFU %", "peak GB",
            "err vs fp64", "note"]  # fmt: skip
    return columns(lines, head, markdown)


def sections(rows: Iterable, markdown: bool) -> list[tuple[str, str]]:
    """(title, text) of everything there are rows for."""
    rows, found = list(rows), []
    plain = [r for r in rows if isinstance(r, Row)]
    if some := [r for r in plain if r.suite == "correctness"]:
        found.append(("Correctness: largest error, relative to each tensor's peak", correctness(some, markdown)))
    for suite, title in (("model", "Whole models and pictures"), ("kernels", "Operations"), ("sampling", "Sampling")):
        if some := [r for r in plain if r.suite == suite]:
            found.append((title, speed(some, markdown)))
    if some := [r for r in plain if r.suite == "harness"]:
        found.append(("The run itself", columns([[r.op, r.note] for r in some], ["what", "how it ended"], markdown)))
    if any(r.device == "cuda" for r in plain):
        text = columns(targets.verdicts(plain), targets.HEAD, markdown)
        found.append(("Numbers to reach on an H200 in bf16", text))
    if some := [r for r in rows if isinstance(r, CompileRow)]:
        text = compiling.table(sorted(some, key=lambda r: (r.arch, r.kernel, r.function, r.case)), markdown)
        found.append(("Compiler evidence (compiled only: nothing here was timed)", text))
    if some := [r for r in rows if isinstance(r, StepRow)]:
        by_preset = [[r for r in some if r.preset == preset] for preset in dict.fromkeys(r.preset for r in some)]
        text = "\n\n".join(step.table(rows_of, markdown) for rows_of in by_preset)
        found.append(("What a training step is made of (counted; floors at an H200's ceilings, not timed)", text))
    return found


def plots(rows: Iterable, out: Path) -> list[Path]:
    """Bars of ours against each peer, one PNG a suite, where matplotlib is installed."""
    if not importlib.util.find_spec("matplotlib"):
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    for suite in ("model", "kernels", "sampling"):
        ours = [r for r in rows if isinstance(r, Row) and r.suite == suite and r.impl == "ours" and r.ratios]
        if not ours:
            continue
        bars = [(f"{r.op} {r.case} vs {peer}", ratio) for r in ours for peer, ratio in r.ratios.items()][:60]
        figure, axis = pyplot.subplots(figsize=(9, 1 + 0.22 * len(bars)))
        axis.barh([name for name, _ in bars], [ratio for _, ratio in bars])
        axis.axvline(1.0, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_xlabel("times as quick as the peer, same run")
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
        figure.tight_layout()
        made.append(out / f"{suite}.png")
        figure.savefig(made[-1], dpi=110)
        pyplot.close(figure)
    return made


def write(rows: list, failed: list[str], out: Path, extra: str = "") -> Path:
    """report.md and its plots in `out`."""
    stamped = next((r for r in rows if isinstance(r, Row)), None)
    lines = ["# Benchmark report", ""]
    if stamped:
        s = stamped
        lines += [f"{s.gpu}; torch {s.torch}, Triton {s.triton}, commit {s.commit}, {s.date}.", ""]
    lines += ["Everything that was checked holds." if not failed else "**Red:**", *(f"- {name}" for name in failed), ""]
    for title, text in sections(rows, markdown=True):
        lines += [f"## {title}", "", text, ""]
    lines += [f"![{path.stem}]({path.name})" for path in plots(rows, out)]
    path = out / "report.md"
    path.write_text("\n".join([*lines, extra, ""]))
    return path

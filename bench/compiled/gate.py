"""The compile suite as a gate: rows against the committed baseline, worse is red, with the difference in words.

Rows are compared within one Triton version: another has another baseline, or none.
"""

from collections.abc import Iterable

from bench import rows
from bench.machine import ROOT
from bench.rows import CompileRow

BASELINE = ROOT / "bench" / "compiled" / "baseline.jsonl"
REGISTERS = 8  # the compiler hands them out by eights: less is no change


def waits_left(row: CompileRow) -> int:
    """Waits that leave a product in flight: where it overlaps with something."""
    return sum(depth not in ("", "0") for depth in row.waits.split(","))


def worse(row: CompileRow, base: CompileRow) -> list[str]:
    """What a binary lost, each in words; empty if nothing."""
    allowed = {"stack": 0, "spill_loads": 0, "spill_stores": 0, "regs": REGISTERS, "shared": 0.1 * base.shared}
    lost = [name for name, more in allowed.items() if getattr(row, name) > getattr(base, name) + more]
    lost += [name for name in ("mma", "wgmma", "tma") if getattr(base, name) and not getattr(row, name)]
    lost += [name for name in ("occupancy", "exp2_under") if getattr(row, name) < getattr(base, name)]
    lost += ["waits"] if waits_left(row) < waits_left(base) else []
    found = [f"{name} {getattr(base, name)} -> {getattr(row, name)}" for name in lost]
    return found or ([row.note] if base.ok and not row.ok else [])


def compare(found: Iterable[CompileRow], baseline: Iterable[CompileRow]) -> list[str]:
    """One line for each binary that got worse. Binaries that the baseline lacks are new, and no one's loss."""
    before = {(r.triton, *r.key): r for r in baseline}
    lines = []
    for row in found:
        base = before.get((row.triton, *row.key))
        if base and (lost := worse(row, base)):
            tile = row.tile if row.tile == base.tile else f"{base.tile} -> {row.tile}"
            name = f"{row.function} [{row.variant}] {row.case} {row.arch}"
            lines.append(f"compile gate: {name}, {tile}: {'; '.join(lost)}")
    return lines


def read() -> list[CompileRow]:
    return rows.read(BASELINE) if BASELINE.exists() else []


def renew(found: list[CompileRow]) -> None:
    """The rows become the baseline of their Triton version."""
    kept = [row for row in read() if row.triton != found[0].triton]
    ordered = sorted([*kept, *found], key=lambda row: (row.triton, *row.key))
    BASELINE.write_text("".join(rows.to_json(row) + "\n" for row in ordered))

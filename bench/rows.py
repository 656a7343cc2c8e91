"""Rows of a report: frozen dataclasses, one JSON line each. DESIGN.md's schema is these fields."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class CompileRow:
    """What one launch compiles to on one architecture, read off the binary. Nothing here was timed.

    spill_loads and spill_stores count instructions (LDL, STL; on AMD spilled registers), stack and shared are bytes,
    occupancy is resident warps over the machine's limit, waits are the wgmma wait depths in program order: a 0 waits
    for every product in flight, so nothing overlaps there."""

    suite: str
    kernel: str
    function: str
    case: str
    arch: str
    tile: str
    triton: str
    regs: int = 0
    stack: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    shared: int = 0
    occupancy: float = 0.0
    mma: int = 0
    wgmma: int = 0
    tma: int = 0
    waits: str = ""
    exp2: int = 0
    instructions: int = 0
    dots: int = 0
    ok: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, self.function, self.case, self.arch


def to_json(row) -> str:
    return json.dumps(asdict(row))


def from_json(kind, line: str):
    """Raises ValueError naming the fields if the line isn't one of `kind`."""
    values, known = json.loads(line), {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__}: unknown fields {unknown}")
    return kind(**values)


def read(kind, path: str | Path) -> list:
    return [from_json(kind, line) for line in Path(path).read_text().splitlines() if line.strip()]

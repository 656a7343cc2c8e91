"""Rows of a report: frozen dataclasses, one JSON line each. DESIGN.md's schema is these fields."""

import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One implementation on one case: how far from fp64 (`suite` correctness) or how quick.

    err_vs_fp64 is the largest error over the output and every gradient, each relative to its own fp64 maximum, and
    eager_err_vs_fp64 that of eager PyTorch in the same dtype. ratios: this row's speed over each peer's in the same
    run (2.0: twice as quick). pct_floor: floor_ms over median_ms. mfu counts cost.model's FLOPs without attention's
    recomputed product, over a GPU's data sheet, elsewhere over the measured ceiling. A correctness row that is not ok
    takes the speeds of its operation away."""

    suite: str
    op: str
    impl: str
    dtype: str
    direction: str
    B: int = 0
    N: int = 0
    H: int = 0
    D: int = 0
    d: int = 0
    causal: bool = True
    preset: str = ""
    device: str = ""
    gpu: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    runs: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    tflops: float | None = None
    tb_s: float | None = None
    floor_ms: float | None = None
    pct_floor: float | None = None
    per_s: float | None = None
    unit: str = ""
    mfu: float | None = None
    peak_gb: float | None = None
    err_vs_fp64: float | None = None
    eager_err_vs_fp64: float | None = None
    ok: bool = True
    ratios: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def case(self) -> str:
        """The case in words, the same for every implementation."""
        size = f"{self.preset} " if self.preset else ""
        shape = " ".join(f"{k}{v}" for k in ("B", "N", "H", "D", "d") if (v := getattr(self, k)))
        full = "" if self.causal else " full"
        return f"{size}{shape} {self.dtype}{full} {self.direction}"

    @property
    def key(self) -> tuple[str, ...]:
        return self.suite, self.op, self.case, self.impl, self.device

    def __str__(self) -> str:
        """For whoever waits: what was found."""
        found = [f"{self.median_ms:.3g} ms"] if self.median_ms else []
        found += [f"{ratio:.2f}x {peer}" for peer, ratio in self.ratios.items()]
        if self.err_vs_fp64 is not None and not found:
            found.append(f"{self.err_vs_fp64:.2e} (eager {self.eager_err_vs_fp64:.2e})")
        found += [] if found and self.ok else [self.note]
        return f"{self.op} {self.case} {self.impl}: {'' if self.ok else 'RED '}{', '.join(found)}"


@dataclass(frozen=True)
class StepRow:
    """One kernel's share of a training step: `launches` of it, the bytes of its arguments each once, its FLOPs, and
    the floor of their sum at an H200's ceilings. Counted from recorded launches, not timed."""

    suite: str
    preset: str
    B: int
    N: int
    kernel: str
    vendor: bool
    launches: int
    bytes: float
    flops: float
    floor_ms: float


@dataclass(frozen=True)
class CompileRow:
    """What one launch compiles to on one architecture, read off the binary. Nothing here was timed.

    spill_loads and spill_stores count instructions (LDL, STL; on AMD spilled registers), stack and shared are bytes,
    occupancy is resident warps over the machine's limit, waits are the wgmma wait depths in program order: a 0 waits
    for every product in flight, so nothing overlaps there. exp2_under: how many of the exp2 exponentials are issued
    with a product in flight. variant: the constants that tell one binary of a function from another. rings: what
    asynchronous products read in shared memory, races: what is wrong with it (bench/compiled/rings.py)."""

    suite: str
    kernel: str
    function: str
    case: str
    arch: str
    tile: str
    triton: str
    variant: str = ""
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
    exp2_under: int = 0
    instructions: int = 0
    dots: int = 0
    rings: str = ""
    races: str = ""
    ok: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return self.kernel, self.function, self.case, self.arch, self.variant

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else f"RED {self.note}"


KINDS = {"compile": CompileRow, "step": StepRow}


def to_json(row) -> str:
    return json.dumps(asdict(row))


def append(row, path: Path | None) -> None:
    """One more line of the file, if there is one."""
    if path:
        with path.open("a") as file:
            print(to_json(row), file=file)


def from_json(line: str):
    """The row of one line; `suite` says of which kind. Raises ValueError naming unknown or missing fields."""
    values = json.loads(line)
    try:
        return KINDS.get(values.get("suite"), Row)(**values)
    except TypeError as error:
        raise ValueError(f"{line[:80]}: {error}") from error


def read(path: str | Path) -> list:
    return [from_json(line) for line in Path(path).read_text().splitlines() if line.strip()]


def joined(found: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, Row]:
    """The rows by their key, those of one key as one: timed again beside other peers its ratios join, each to the time
    of its own run, and a row that found no time left takes none away."""
    kept: dict[Hashable, Row] = {}
    for row in found:
        before = kept.setdefault(key(row), row)
        if row.median_ms or not before.median_ms:
            kept[key(row)] = replace(row, ratios=before.ratios | row.ratios)
    return kept


def regressions(rows: list, earlier: list, allowed: float = 1.1) -> list[str]:
    """Time over the earlier time of every measured row found in both; a regression is slower by more than `allowed`
    with the 20-80% ranges apart."""
    before, lines = {r.key: r for r in earlier if isinstance(r, Row) and r.median_ms}, []
    for r in rows:
        if isinstance(r, Row) and r.median_ms and (b := before.get(r.key)):
            is_slower = r.median_ms > allowed * b.median_ms and r.p20_ms > b.p80_ms
            verdict = ": REGRESSION" if is_slower else ""
            lines.append(f"{r.op} {r.case} {r.impl}: {r.median_ms / b.median_ms:.2f}x the earlier time{verdict}")
    return lines

"""Speed rows of operations: a case's variants built, warmed up, timed in turns; rows with ratios and floors."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench import peers
from bench.cases import Case
from bench.machine import FAULTS, ceilings, stamp
from bench.peers import Absent
from bench.rows import Row
from bench.timing import CpuTimer, CudaTimer, Stats, interleaved


@dataclass
class Run:
    """What every measurement of one run shares: the device, a timer for operations and one for whole steps, the peers
    asked for, seconds a case may take, and when to stop."""

    device: str
    timer: Callable
    step_timer: Callable
    peers: str = "all"
    case_s: float = 2.0
    deadline: float = float("inf")
    red: frozenset[tuple[str, str]] = frozenset()  # subjects whose correctness is red
    errors: dict[tuple, tuple[float, float]] = field(default_factory=dict)
    least: int = 3
    clock: Callable[[], float] = time.monotonic

    @property
    def late(self) -> bool:
        return self.clock() > self.deadline


def subject(x: Row | Case) -> tuple[str, str]:
    """What a correctness row speaks for: an operation and a dtype."""
    return x.op, x.dtype


def timers(device: str) -> tuple[Callable, Callable]:
    """For operations and for whole steps."""
    return (CudaTimer(), CudaTimer(lead=False)) if device == "cuda" else (CpuTimer(), CpuTimer())


def call(fn: Callable, inputs: dict, diff: tuple[str, ...], direction: str) -> Callable[[], object]:
    """What is timed: "fwd" without a gradient, "bwd" alone, or both."""
    if direction == "fwd" or not diff:

        def forward():
            with torch.no_grad():
                return fn(**inputs)

        return forward
    args = {k: v.detach().requires_grad_(k in diff) for k, v in inputs.items()}
    leaves = [args[k] for k in diff]
    out = fn(**args)
    grad = torch.randn_like(out)
    if direction == "bwd":
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(fn(**args), leaves, grad)


def warmed(build: Callable[[], object]) -> Callable | Absent:
    """The variant after a call (on a GPU up to three within a moment, to settle its clock), or why it cannot run here.
    A GPU's fault shows at the synchronisation."""
    try:
        variant = build()
        if not isinstance(variant, Absent):
            start = time.monotonic()
            variant()
            for _ in range(2 if torch.cuda.is_available() else 0):
                torch.cuda.synchronize()
                if time.monotonic() - start < 0.3:
                    variant()
        return variant
    except FAULTS as fault:
        return Absent(f"raised {type(fault).__name__}: {str(fault).splitlines()[0][:200] if str(fault) else ''}")


def filled(row: Row, stats: Stats, case, device: str) -> Row:
    """Times, rates and the floor of one variant."""
    cost, roof = case.cost(), ceilings(device)
    floor, seconds = roof.floor_ms(cost, case.dtype), stats.median / 1e3
    return dataclasses.replace(
        row, median_ms=stats.median, p20_ms=stats.p20, p80_ms=stats.p80, runs=stats.runs, flops=cost.flops,
        bytes=cost.bytes, tflops=cost.flops / seconds / 1e12, tb_s=cost.bytes / seconds / 1e12, floor_ms=floor,
        pct_floor=100 * floor / stats.median,
    )  # fmt: skip


def rows_of(case: Case, variants: dict, run: Run, extra: Callable) -> Iterator[Row]:
    """Time the variants of one case together. An absent one leaves a row without a speed that says why; ours gets its
    ratio to each of the others; extra(row, name) adds what the caller knows."""
    blank = {name: Row("kernels", impl=name, **case.labels, **stamp(run.device)) for name in variants}
    present = {name: fn for name, fn in variants.items() if not isinstance(fn, Absent)}
    timed = interleaved(present, run.timer, run.case_s, run.least, warm=0) if present else {}
    for name, fn in variants.items():
        if isinstance(fn, Absent):
            yield dataclasses.replace(blank[name], note=f"absent: {fn.why}", ok=name != "ours")
            continue
        row = filled(blank[name], timed[name], case, run.device)
        if name == "ours":
            others = {n: s.median / timed["ours"].median for n, s in timed.items() if n not in ("ours", "ours again")}
            row = dataclasses.replace(row, ratios=others)
        yield extra(row, name)


def operations(cases: Iterable[Case], run: Run) -> Iterator[Row]:
    """Rows of single operations. One whose correctness is red has no speed."""
    for case in cases:
        if subject(case) in run.red or run.late:
            why = "its correctness is red" if subject(case) in run.red else "no time was left"
            yield Row("kernels", impl="ours", **case.labels, **stamp(run.device), note=f"not timed: {why}")
            continue
        inputs = case.inputs(run.device)
        builders = {"ours": lambda case, device: case.ours()} | peers.chosen(peers.of(case), run.peers)
        if run.device == "cuda":
            builders |= {"ours again": builders["ours"]}
        variants = {}
        for name, build in builders.items():
            made = build(case, run.device)
            if not isinstance(made, Absent):
                given, diff = peers.operands(name, case, inputs)
                made = warmed(functools.partial(call, made, given, diff, case.direction))
            variants[name] = made

        def with_error(row, name, case=case):
            ours, eager = run.errors.get((case.op, case.dtype), (None, None))
            if name == "ours":
                return dataclasses.replace(row, err_vs_fp64=ours, eager_err_vs_fp64=eager)
            return dataclasses.replace(row, note="one version twice: the noise") if name == "ours again" else row

        yield from rows_of(case, variants, run, with_error)
        torch.compiler.reset()

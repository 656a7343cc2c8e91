"""From variants to rows: built, warmed up, timed in turns; ratios, rates and floors are made here alone."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench.cases import Case
from bench.cost import Cost
from bench.machine import FAULTS, ceilings, raised, stamp
from bench.rows import Row
from bench.speed import peers
from bench.speed.peers import Absent
from bench.speed.timing import CpuTimer, CudaTimer, interleaved


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

    def refusal(self, *subjects: tuple[str, str]) -> str:
        """Why nothing of these operations and dtypes is to be timed, "" if they are."""
        if red := sorted(self.red.intersection(subjects)):
            return f"not timed: the correctness of {', '.join(map(' '.join, red))} is red"
        return "not timed: no time was left" if self.late else ""


def subject(x: Row | Case) -> tuple[str, str]:
    """What a correctness row speaks for: an operation and a dtype."""
    return x.op, x.dtype


def timers(device: str) -> tuple[Callable, Callable]:
    """For operations and for whole steps."""
    return (CudaTimer(), CudaTimer(lead=False)) if device == "cuda" else (CpuTimer(), CpuTimer())


def blank(suite: str, impl: str, case, device: str, **more) -> Row:
    """The row of one implementation on one case with nothing measured yet."""
    return Row(suite, impl=impl, **case.labels, **stamp(device), **more)


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
        return Absent(raised(fault))


@dataclass(frozen=True, eq=False)
class Variant:
    """One implementation to be timed: its row so far, and a call that costs `cost`.

    scale: of the row's milliseconds to the call's (a token's share of many, or a part's time for the whole). rate: what
    is done in the row's milliseconds; ratios compare rates. unit: what per_s counts, "" for nothing."""

    row: Row
    run: Callable | Absent
    cost: Cost
    scale: float = 1.0
    rate: float = 1.0
    unit: str = ""


OURS = ("ours", "ours, building", "hugging face patched")  # no rivals to each other


def rows_of(variants: Iterable[Variant], run: Run, timer: Callable, warm: int = 0) -> Iterator[Row]:
    """Time the variants together. An absent one leaves a row without a speed that says why; ours get their ratio to
    each other variant of their dtype, and to Hugging Face in fp32, its default."""
    variants = list(variants)
    present = {v: v.run for v in variants if not isinstance(v.run, Absent)}
    timed = interleaved(present, timer, run.case_s, run.least, warm=warm) if present else {}
    pace = {v: t.median * v.scale / v.rate for v, t in timed.items()}
    for v in variants:
        row, ratios = v.row, {}
        if v not in timed:
            yield dataclasses.replace(row, note=f"absent: {v.run.why}", ok=row.impl != "ours")
            continue
        if row.impl in OURS:
            for other in pace:
                name = other.row.impl
                if other.row.dtype != row.dtype:
                    name = "hugging face fp32" if (name, other.row.dtype) == ("hugging face", "fp32") else ""
                if name not in ("", "ours again", *OURS):
                    ratios[name] = pace[other] / pace[v]
        t, floor = timed[v], ceilings(run.device).floor_ms(v.cost, PRODUCT_DTYPE.get(row.dtype, row.dtype))
        ms = t.median * v.scale
        yield dataclasses.replace(
            row, median_ms=ms, p20_ms=t.p20 * v.scale, p80_ms=t.p80 * v.scale, runs=t.runs, flops=v.cost.flops,
            bytes=v.cost.bytes, tflops=v.cost.flops / ms / 1e9, tb_s=v.cost.bytes / ms / 1e9, floor_ms=floor,
            pct_floor=100 * floor / ms, per_s=1e3 * v.rate / ms if v.unit else None, unit=v.unit, ratios=ratios,
        )  # fmt: skip


PRODUCT_DTYPE = {"int8": "bf16"}  # what weights of a narrower dtype are multiplied in


def operations(cases: Iterable[Case], run: Run) -> Iterator[Row]:
    """Rows of single operations. One whose correctness is red has no speed."""
    for case in cases:
        row = functools.partial(blank, "kernels", case=case, device=run.device)
        if why := run.refusal(subject(case)):
            yield row("ours", note=why)
            continue
        inputs = case.inputs(run.device)
        builders = {"ours": lambda case, device: case.ours()} | peers.chosen(peers.of(case), run.peers)
        if run.device == "cuda":
            builders |= {"ours again": builders["ours"]}
        ours, eager = run.errors.get(subject(case), (None, None))
        more = {
            "ours": {"err_vs_fp64": ours, "eager_err_vs_fp64": eager},
            "ours again": {"note": "one version twice: the noise"},
            "torch.compile": {"note": peers.COMPILED_NOTE},
        }
        variants = []
        for name, build in builders.items():
            made = build(case, run.device)
            if not isinstance(made, Absent):
                given, diff = peers.operands(name, case, inputs)
                made = warmed(functools.partial(call, made, given, diff, case.direction))
            variants.append(Variant(row(name, **more.get(name, {})), made, case.cost()))
        yield from rows_of(variants, run, run.timer)
        torch.compiler.reset()

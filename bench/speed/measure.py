"""From variants to rows: built, warmed up, timed in turns; ratios, rates and floors are made here alone."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench.cases import Case, Timed
from bench.machine import FAULTS, ceilings, raised, stamp
from bench.rows import Row
from bench.speed import peers
from bench.speed.peers import Absent
from bench.speed.timing import CpuTimer, CudaTimer, interleaved
from igpt.machine import peak_flops


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

    def refusal(self, case: Timed) -> str:
        """Why nothing of this case is to be timed, "" if it is."""
        if red := sorted(self.red.intersection(case.needs)):
            return f"not timed: the correctness of {', '.join(map(' '.join, red))} is red"
        return "not timed: no time was left" if time.monotonic() > self.deadline else ""


def timers(device: str) -> tuple[Callable, Callable]:
    """For operations and for whole steps."""
    return (CudaTimer(), CudaTimer(lead=False)) if device == "cuda" else (CpuTimer(), CpuTimer())


def blank(suite: str, impl: str, case: Timed, device: str, **more) -> Row:
    """The row of one implementation on one case with nothing measured yet."""
    return Row(suite, impl=impl, **case.labels, **stamp(device) | more)


def call(fn: Callable, inputs: dict, diff: tuple[str, ...], direction: str) -> Callable[[], object]:
    """What is timed: "fwd" without a gradient, "bwd" alone, or both."""
    if direction == "fwd" or not diff:
        return torch.no_grad()(functools.partial(fn, **inputs))
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


@dataclass(frozen=True)
class Variant:
    """One implementation of a case: build(case) makes the call that is timed, or says why there is none. done: how much
    of the case's work such a call does, where not all."""

    impl: str
    case: Timed
    build: Callable[[Timed], Callable | Absent]
    note: str = ""
    done: float = 1.0


def fitted(v: Variant, gpu: bool) -> tuple[Callable | Absent, Timed, float | None]:
    """The variant's call, its case, and of a whole model the GB that it took of a GPU, at the largest batch that fits:
    B, B / 2, ... 1."""
    while True:
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        held, made = torch.cuda.memory_allocated(), warmed(functools.partial(v.build, v.case))
        is_too_big = isinstance(made, Absent) and "OutOfMemory" in made.why
        if not (is_too_big and v.case.is_whole and v.case.B > 1):
            took = (torch.cuda.max_memory_allocated() - held) / 1e9
            return made, v.case, took if gpu and v.case.is_whole else None
        torch.cuda.empty_cache()
        v = dataclasses.replace(v, case=dataclasses.replace(v.case, B=v.case.B // 2))


OURS = ("ours", "ours, building", "hugging face patched")  # no rivals to each other


def rows_of(suite: str, variants: Iterable[Variant], run: Run, timer: Callable) -> Iterator[Row]:
    """Time the variants together. A case whose correctness is red, or that no time is left for, has a row that says so;
    so has a variant that is absent. Ours get their ratio to each other variant of their dtype, and to Hugging Face in
    fp32, its default."""
    refused: dict[Timed, str] = {}
    made = []
    for v in variants:
        if v.case not in refused:
            refused[v.case] = run.refusal(v.case)
            if why := refused[v.case]:
                yield blank(suite, "ours", v.case, run.device, note=why)
        if not refused[v.case]:
            fn, case, peak = fitted(v, run.device == "cuda")
            row = blank(suite, v.impl, case, run.device, note=v.note, peak_gb=peak)
            if isinstance(fn, Absent):
                yield dataclasses.replace(row, note=f"absent: {fn.why}", ok=row.impl != "ours")
            else:
                made.append((row, case, fn, case.share / v.done))
    times = interleaved([fn for _, _, fn, _ in made], timer, run.case_s, run.least)
    pace = [t.median * share / case.rate for (_, case, _, share), t in zip(made, times)]
    for (row, case, _, share), t, mine in zip(made, times, pace):
        ratios, known, cost = {}, {}, case.cost()
        if row.impl in OURS:
            for (other, *_), theirs in zip(made, pace):
                name = other.impl
                if other.dtype != row.dtype:
                    name = "hugging face fp32" if (name, other.dtype) == ("hugging face", "fp32") else ""
                if name not in ("", "ours again", *OURS):
                    ratios[name] = theirs / mine
        if row.impl == "ours" and (errors := run.errors.get((row.op, row.dtype))):
            known = dict(zip(("err_vs_fp64", "eager_err_vs_fp64"), errors))
        ms, roof = t.median * share, ceilings(run.device)
        dtype = "bf16" if row.dtype == "int8" else row.dtype  # what such weights are multiplied in
        if useful := case.useful():  # as others publish it: against the data sheet where that is known
            sheet = peak_flops(torch.device(run.device)) if row.dtype != "fp32" else None
            known["mfu"] = useful / (ms / 1e3) / (sheet or roof.flops[row.dtype])
        floor = roof.floor_ms(cost, dtype)
        yield dataclasses.replace(
            row, median_ms=ms, p20_ms=t.p20 * share, p80_ms=t.p80 * share, runs=t.runs, flops=cost.flops,
            bytes=cost.bytes, tflops=cost.flops / ms / 1e9, tb_s=cost.bytes / ms / 1e9, floor_ms=floor,
            pct_floor=100 * floor / ms, per_s=1e3 * case.rate / ms if case.unit else None, unit=case.unit,
            ratios=ratios, **known,
        )  # fmt: skip
    torch.compiler.reset()
    torch.cuda.empty_cache()


def rows(
    suite: str, groups: Iterable[Iterable[tuple[str, Case]]], build: Callable, notes: dict[str, str], run: Run, timer
) -> Iterator[Row]:
    """Rows of groups that are timed together: (implementation, case) each, of which the peers asked for are built."""
    asked = {"ours", "ours again", *peers.chosen(notes, run.peers)}
    for group in groups:
        yield from rows_of(suite, [
            Variant(name, case, functools.partial(build, name, device=run.device), notes[name])
            for name, case in group if name in asked
        ], run, timer)  # fmt: skip


def build(name: str, case: Case, device: str) -> Callable | Absent:
    """The timed call of one implementation of an operation."""
    made = case.ours() if name in ("ours", "ours again") else peers.of(case)[name](case, device)
    if isinstance(made, Absent):
        return made
    return call(made, *peers.operands(name, case, inputs(case, device)), case.direction)


inputs = functools.lru_cache(1)(Case.inputs)
NOTES = dict.fromkeys(("ours", *peers.NAMES), "") | {
    "ours again": "one version twice: the noise", "torch.compile": peers.COMPILED_NOTE,
}  # fmt: skip


def operations(cases: Iterable[Case], run: Run) -> Iterator[Row]:
    """Rows of single operations, each case's variants timed together; on a GPU ours twice."""
    again = ["ours again"] if run.device == "cuda" else []
    groups = ([(name, case) for name in ("ours", *peers.of(case), *again)] for case in cases)
    return rows("kernels", groups, build, NOTES, run, run.timer)

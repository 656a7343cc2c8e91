"""From implementations to rows: built, warmed up, timed in turns; ratios, rates and floors are made here alone.

An implementation of a case is a name and the case: `build(name, case, device)` makes the call that is timed, or raises
where there is none.
"""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from bench.cases import Case
from bench.machine import ceilings, raised, stamp
from bench.rows import Row
from bench.speed import peers
from bench.speed.peers import Absent
from bench.speed.timing import CpuTimer, CudaTimer, interleaved
from igpt.machine import peak_flops


@dataclass
class Run:
    """What every measurement of one run shares: the device, a timer for operations and one for whole steps, the peers'
    names, seconds a case may take, and when to stop."""

    device: str
    timer: Callable
    step_timer: Callable
    peers: Collection[str] = peers.NAMES
    case_s: float = 2.0
    deadline: float = float("inf")
    red: frozenset[tuple[str, str]] = frozenset()  # subjects whose correctness is red
    errors: dict[tuple, tuple[float, float]] = field(default_factory=dict)
    least: int = 3

    def refusal(self, case: Case) -> str:
        """Why nothing of this case is to be timed, "" if it is."""
        if red := sorted(self.red.intersection(case.needs)):
            return f"not timed: the correctness of {', '.join(map(' '.join, red))} is red"
        return "not timed: no time was left" if time.monotonic() > self.deadline else ""


def timers(device: str) -> tuple[Callable, Callable]:
    """For operations and for whole steps."""
    return (CudaTimer(), CudaTimer(lead=False)) if device == "cuda" else (CpuTimer(), CpuTimer())


def blank(suite: str, impl: str, case: Case, device: str, **more) -> Row:
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


def warmed(fn: Callable[[], object]) -> Callable[[], object]:
    """The same after a call (on a GPU up to three within a moment, to settle its clock). A GPU's fault shows at the
    synchronisation."""
    start = time.monotonic()
    fn()
    for _ in range(2 if torch.cuda.is_available() else 0):
        torch.cuda.synchronize()
        if time.monotonic() - start < 0.3:
            fn()
    return fn


def fitted(build: Callable, name: str, case: Case, device: str) -> tuple[Callable, Case, float | None]:
    """The call, its case, and of a whole model the GB that it took of a GPU, at the largest batch that fits: B, B / 2,
    ... 1."""
    is_measured = device == "cuda" and case.is_whole
    while True:
        if is_measured:
            gc.collect()  # Hugging Face's models die in cycles
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        try:
            made = warmed(build(name, case, device))
            return made, case, (torch.cuda.max_memory_allocated() - held) / 1e9 if is_measured else None
        except Exception as fault:  # torch's, or one that tells of it
            if "OutOfMemory" not in raised(fault) or not case.is_whole or case.B == 1:
                raise
        torch.cuda.empty_cache()
        case = dataclasses.replace(case, B=case.B // 2)


OURS = ("ours", "ours, building", "hugging face patched")  # no rivals to each other


def together(
    suite: str, group: list[tuple[str, Case]], build: Callable, notes: dict[str, str], run: Run
) -> Iterator[Row]:
    """Rows of implementations that are timed in turns. A case whose correctness is red, or that no time is left for,
    has a row that says so; so has an implementation that raises, a red one if it is ours. Ours get their ratio to each
    other of their dtype, and to Hugging Face in fp32, its default."""
    refusals = {case: run.refusal(case) for _, case in group}
    yield from (blank(suite, "ours", case, run.device, note=why) for case, why in refusals.items() if why)
    made = []
    for name, case in group:
        if refusals[case]:
            continue
        try:
            fn, case, peak = fitted(build, name, case, run.device)
            made.append((blank(suite, name, case, run.device, note=notes.get(name, ""), peak_gb=peak), case, fn))
        except Exception as fault:
            is_absent, is_mine = isinstance(fault, Absent), name.startswith(("ours", "gluon"))
            note, ok = f"absent: {fault if is_absent else raised(fault)}", name != "ours" and (is_absent or not is_mine)
            yield blank(suite, name, case, run.device, note=note, ok=ok)
    timer = run.timer if suite == "kernels" else run.step_timer
    times = interleaved([fn for *_, fn in made], timer, run.case_s, run.least)
    pace = [t.median / case.steps / case.rate for (_, case, _), t in zip(made, times)]
    for (row, case, _), t, mine in zip(made, times, pace):
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
        ms, roof = t.median / case.steps, ceilings(run.device)
        if useful := case.useful():  # as others publish it: against the data sheet where that is known
            sheet = peak_flops(torch.device(run.device)) if row.dtype != "fp32" else None
            known["mfu"] = useful / (ms / 1e3) / (sheet or roof.flops[row.dtype])
        floor = roof.floor_ms(cost, case.activations)
        yield dataclasses.replace(
            row, median_ms=ms, p20_ms=t.p20 / case.steps, p80_ms=t.p80 / case.steps, runs=t.runs, flops=cost.flops,
            bytes=cost.bytes, tflops=cost.flops / ms / 1e9, tb_s=cost.bytes / ms / 1e9, floor_ms=floor,
            pct_floor=100 * floor / ms, per_s=1e3 * case.rate / ms if case.unit else None, unit=case.unit,
            ratios=ratios, **known,
        )  # fmt: skip
    torch.compiler.reset()
    torch.cuda.empty_cache()


def rows(
    suite: str, groups: Iterable[Iterable[tuple[str, Case]]], build: Callable, notes: dict[str, str], run: Run
) -> Iterator[Row]:
    """The same of several groups, ours and of the others those that the run names."""
    names = {"ours", "ours again", *run.peers}
    for group in groups:
        yield from together(suite, [x for x in group if x[0] in names], build, notes, run)


def build(name: str, case: Case, device: str) -> Callable:
    """The timed call of one implementation of an operation."""
    made = case.ours() if name in ("ours", "ours again") else peers.of(case)[name](case, device)
    return call(made, *peers.operands(name, case, inputs(case, device)), case.direction)


inputs = functools.lru_cache(1)(Case.inputs)
NOTES = {"ours again": "one version twice: the noise", "torch.compile": peers.COMPILED_NOTE}


def operations(cases: Iterable[Case], run: Run) -> Iterator[Row]:
    """Rows of single operations, all that each case has timed together; on a GPU ours twice."""
    again = ["ours again"] if run.device == "cuda" else []
    groups = ([(name, case) for name in ("ours", *peers.of(case), *again)] for case in cases)
    return rows("kernels", groups, build, NOTES, run)

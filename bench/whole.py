"""Speed rows of whole models: ours and its peers on the same tokens, each at the largest batch that fits it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch

from bench import models, peers
from bench.machine import ceilings, stamp
from bench.measure import Run, filled, warmed
from bench.models import ModelCase
from bench.peers import Absent
from bench.rows import Row
from bench.timing import interleaved
from igpt.machine import peak_flops

PARTS = ("embed", "norm", "norm_linear", "attention", "norm_mlp", "head_loss", "model")


def fitting(name: str, case: ModelCase, device: str) -> tuple[Callable | Absent, ModelCase]:
    """The variant at the largest batch that fits: B, B / 2, ... 1."""
    while True:
        made = warmed(functools.partial(models.build, name, case, device))
        if not (isinstance(made, Absent) and "OutOfMemory" in made.why and case.B > 1):
            return made, case
        torch.cuda.empty_cache()
        case = dataclasses.replace(case, B=case.B // 2)


def whole(
    cases: Iterable[ModelCase], run: Run, keep: Callable[[str, ModelCase], bool] = lambda *_: True
) -> Iterator[Row]:
    """Rows of whole models. Cases of one preset, length and direction, whatever their dtype, are timed together: each
    ratio of ours is to the same dtype, and to Hugging Face in fp32, its default. Rates and ratios are a token's."""
    groups: dict[tuple, list[ModelCase]] = {}
    for case in cases:
        groups.setdefault((case.preset, case.N, case.B, case.direction), []).append(case)
    for group in groups.values():
        if (red := run.red & set(itertools.product(PARTS, {case.dtype for case in group}))) or run.late:
            why = f"the correctness of {', '.join(map(' '.join, sorted(red)))} is red" if red else "no time was left"
            for case in group:
                yield Row("model", impl="ours", **case.labels, **stamp(run.device), note=f"not timed: {why}")
            continue
        variants, fitted, peak = {}, {}, {}
        for case in group:
            for name in ("ours", *peers.chosen(dict.fromkeys(models.PEERS), run.peers)):
                if not keep(name, case):
                    continue
                key = name, case.dtype
                if run.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    held = torch.cuda.memory_allocated()
                variants[key], fitted[key] = fitting(name, case, run.device)
                if run.device == "cuda":
                    peak[key] = (torch.cuda.max_memory_allocated() - held) / 1e9
        yield from _rows(variants, fitted, peak, run)
        del variants
        torch.compiler.reset()
        if run.device == "cuda":
            torch.cuda.empty_cache()


def _rows(variants: dict, fitted: dict, peak: dict, run: Run) -> Iterator[Row]:
    present = {key: fn for key, fn in variants.items() if not isinstance(fn, Absent)}
    timed = interleaved(present, run.step_timer, run.case_s, run.least, warm=0) if present else {}

    def token_ms(key):
        return timed[key].median / (fitted[key].B * fitted[key].N)

    for key, fn in variants.items():
        (name, dtype), case = key, fitted[key]
        row = Row("model", impl=name, **case.labels, **stamp(run.device), note=models.NOTES[name])
        if isinstance(fn, Absent):
            yield dataclasses.replace(row, note=f"absent: {fn.why}", ok=name != "ours")
            continue
        row = filled(row, timed[key], case, run.device)
        ratios = {}
        if name == "ours":
            ratios = {n: token_ms((n, d)) / token_ms(key) for n, d in timed if n != "ours" and d == dtype}
            default = "hugging face", "fp32"
            if dtype != "fp32" and default in timed:
                ratios["hugging face fp32"] = token_ms(default) / token_ms(key)
        elif name == "hugging face patched" and ("hugging face", dtype) in timed:
            ratios = {"hugging face": token_ms(("hugging face", dtype)) / token_ms(key)}
        # As others publish it, against the data sheet where that is known, not against what is reached at best.
        sheet = peak_flops(torch.device(run.device)) if dtype != "fp32" else None
        useful = models.flops(case) / (timed[key].median / 1e3) / (sheet or ceilings(run.device).flops[dtype])
        yield dataclasses.replace(
            row, ratios=ratios, per_s=1e3 / token_ms(key), unit="tokens", mfu=useful, peak_gb=peak.get(key)
        )

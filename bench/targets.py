"""The numbers this project wants to reach on an H200, in bf16, and which of them a run's rows reach.

`python -m bench.targets bench/results/h200/rows.jsonl`. Each has its cases, and counts as reached where the worst of
them does.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import rows
from bench.rows import Row
from bench.tables import columns

OWN = {"ours again", "torch path"}  # no rivals
HEADS = {64: 1.1, 96: 1.2, 128: 1.1}


@dataclass(frozen=True)
class Value:
    """What one case reached."""

    case: str
    value: float


@dataclass(frozen=True)
class Target:
    """`values(rows)`: of each measured case; `cases`: how many there are to measure. At least `asked`, or at most."""

    name: str
    asked: float
    unit: str
    cases: int
    values: Callable[[list[Row]], Iterator[Value]]
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.asked if self.at_most else value >= self.asked


def ours(found: list[Row], **wanted) -> Iterator[Row]:
    """Our measured rows with these fields."""
    return (r for r in found if r.median_ms and all(getattr(r, name) == value for name, value in wanted.items()))


def size(r: Row) -> str:
    return f"{r.preset.upper()} {r.N}".strip()


def ratio(peer: str | None, **wanted) -> Callable[[list[Row]], Iterator[Value]]:
    """Our speed over one peer's, or over the best one's."""

    def values(found: list[Row]) -> Iterator[Value]:
        for r in ours(found, **wanted):
            rivals = [x for name, x in r.ratios.items() if name == peer or (peer is None and name not in OWN)]
            if rivals:
                yield Value(size(r), min(rivals))

    return values


def of_floor(found: list[Row]) -> Iterator[Value]:
    """The head's percent of its floor. That is its products': at V = 512 they are 512 FLOPs a byte of x, where an H200
    balances 184, so that its bytes alone would ask for what no product allows."""
    for r in ours(found, op="head_loss", direction="fwd+bwd"):
        if r.pct_floor:
            yield Value(size(r), r.pct_floor)


def pixels(found: list[Row]) -> Iterator[Value]:
    for r in ours(found, op="palette_encode"):
        rate = r.B * r.N / r.median_ms / 1e6
        yield Value("", rate)


def utilisation(preset: str) -> Callable[[list[Row]], Iterator[Value]]:
    def values(found: list[Row]) -> Iterator[Value]:
        for r in ours(found, op="model", direction="step", preset=preset, N=1024):
            if r.mfu:
                yield Value(size(r), 100 * r.mfu)

    return values


def over_1024(field: str) -> Callable[[list[Row]], Iterator[Value]]:
    """A step's figure at 4096 over that at 1024, the tokens being as many."""

    def values(found: list[Row]) -> Iterator[Value]:
        short = {r.preset: r for r in ours(found, op="model", direction="step", N=1024)}
        for r in ours(found, op="model", direction="step", N=4096):
            base = short.get(r.preset)
            if base and base.B * base.N == r.B * r.N and getattr(base, field) and getattr(r, field):
                yield Value(size(r), getattr(r, field) / getattr(base, field))

    return values


def seconds(found: list[Row]) -> Iterator[Value]:
    for r in ours(found, op="first step"):
        yield Value(size(r), r.median_ms / 1e3)


def targets() -> list[Target]:
    attention = [
        Target(f"attention {name}, D {D}", asked, "x the best peer", 3,
               ratio(None, op="attention", direction=direction, D=D, causal=True))
        for direction, name in (("fwd", "forward"), ("bwd", "backward"))
        for D, asked in (HEADS if direction == "fwd" else dict.fromkeys(HEADS, 1.05)).items()
    ]  # fmt: skip
    mlp = [
        Target(f"norm + MLP {direction}, {preset.upper()}", asked, "x torch.compile", 1,
               ratio("torch.compile", op="norm_mlp", direction=direction, preset=preset))
        for direction in ("fwd", "bwd") for preset, asked in (("s", 1.2), ("m", 1.1), ("l", 1.05))
    ]  # fmt: skip
    step = {"op": "model", "direction": "step"}
    return [
        *attention,
        *mlp,
        *(Target(f"head {d}", 3.0, "x torch.compile", 3, ratio("torch.compile", op="head_loss", direction=d))
          for d in ("fwd", "bwd")),
        Target("head fwd+bwd", 60.0, "% of its floor", 3, of_floor),
        Target("palette", 4.0, "Gpixel/s", 1, pixels),
        Target("training step", 1.5, "x torch.compile with cuDNN's SDPA", 3, ratio("torch.compile", **step)),
        Target("training step", 4.0, "x Hugging Face", 9, ratio("hugging face", **step)),
        *(Target(f"MFU, {preset.upper()}", asked, "%", 1, utilisation(preset))
          for preset, asked in (("s", 45.0), ("m", 55.0), ("l", 60.0))),
        Target("tokens/s at 4096 by the FLOP law", 1.0, "x the MFU at 1024", 3, over_1024("mfu")),
        Target("memory at 4096, linear in N", 1.05, "x that of as many tokens at 1024", 3, over_1024("peak_gb"), True),
        Target("first step after import", 30.0, "s", 1, seconds, True),
    ]  # fmt: skip


def merged(found: Iterable) -> list[Row]:
    """Our rows on a GPU in bf16, one a case."""
    kept: dict[tuple, Row] = {}
    for r in found:
        of_ours = isinstance(r, Row) and r.impl == "ours" and r.device == "cuda"
        if of_ours and (r.dtype == "bf16" or r.op.startswith("palette")):
            key = r.op, r.preset, r.N, r.D, r.causal, r.direction
            kept[key] = rows.joined(kept.get(key), r)
    return list(kept.values())


def verdicts(found: Iterable) -> list[list[str]]:
    """For each number: what it is, what is asked, what the worst case reached, each case, and the verdict."""
    mine, lines = merged(found), []
    for t in targets():
        values = list(t.values(mine))
        asked = f"{'at most' if t.at_most else 'at least'} {t.asked:g} {t.unit}"
        if not values:
            lines.append([t.name, asked, "-", "", "not measured"])
            continue
        worst = (max if t.at_most else min)(v.value for v in values)
        each = ", ".join(f"{v.case} {v.value:.3g}".strip() for v in values)
        said = "reached" if t.reached(worst) else "missed"
        if len(values) < t.cases:
            said += f" ({len(values)} of {t.cases} cases)"
        lines.append([t.name, asked, f"{worst:.3g}", each, said])
    return lines


HEAD = ["number", "asked", "worst case", "cases", "verdict"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="a run's rows.jsonl")
    args = parser.parse_args(argv)
    print(columns(verdicts(rows.read(args.rows)), HEAD, markdown=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

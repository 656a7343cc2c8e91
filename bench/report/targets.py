"""The numbers this project wants to reach on an H200, in bf16, and which of them a run's rows reach.

Each has its cases, and counts as reached where the worst of them does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench import rows
from bench.rows import Row


@dataclass(frozen=True)
class Target:
    """`value`, a field or the ratio to a peer, of each of our measured rows whose fields are as wanted: at least
    `asked`, or at most. `cases`: how many rows there are to measure."""

    name: str
    asked: float
    unit: str
    wanted: dict
    value: str
    cases: int = 1
    at_most: bool = False


HEAD_LOSS = {"op": "head_loss", "direction": "fwd+bwd", "N": 1024, "B": 64}
STEP = {"op": "model", "direction": "step"}
ONE, MANY = ({"op": "decode", "N": 544, "B": B} for B in (1, 128))  # a token of the average window
TARGETS = [
    Target(f"{name}, {preset.upper()}", asked, unit, wanted | {"preset": preset}, value, at_most=value == "median_ms")
    for name, numbers, unit, wanted, value in (
        ("head, forward + backward", (0.367, 0.585, 0.844), "ms", HEAD_LOSS, "median_ms"),
        ("MFU of a step", (0.45, 0.60, 0.63), "of the data sheet", STEP | {"N": 1024}, "mfu"),
        ("step", (1.5, 1.2, 1.15), "x torch.compile", STEP | {"N": 1024}, "torch.compile"),
        ("a token at batch 1", (0.25, 0.55, 1.1), "ms", ONE, "median_ms"),
        ("a token at batch 1, in one launch", (0.15, 0.40, 0.90), "ms", ONE, "median_ms"),
        ("a token at batch 128", (1.2, 3.6, 7.5), "ms", MANY, "median_ms"),
        ("pictures at batch 128", (100.0,), "a second", MANY, "per_s"),
        ("a token at batch 1", (50.0,), "x Hugging Face", ONE, "hugging face"),
        ("int8 weights at batch 1", (None, 1.3, 1.3), "x bf16", ONE | {"dtype": "int8"}, "ours bf16"),
    )
    for preset, asked in zip("sml", numbers) if asked
] + [
    Target(f"attention {direction}, D {D}", 1.15 if D == 96 else 1.05, "x cuDNN",
           {"op": "attention", "direction": direction, "D": D, "causal": True}, "sdpa cudnn", cases=3)
    for direction in ("fwd", "bwd") for D in (64, 96, 128)
] + [Target("step", 4.0, "x Hugging Face", STEP, "hugging face", cases=9)]  # fmt: skip


def merged(found: Iterable) -> list[Row]:
    """Our rows on a GPU, one a case; those of another dtype with their speed over bf16's."""
    ours = (r for r in found if isinstance(r, Row) and (r.impl, r.device) == ("ours", "cuda"))
    kept = rows.joined(ours, lambda r: (r.dtype, r.op, r.preset, r.B, r.N, r.D, r.causal, r.direction))
    for key, r in kept.items():
        if (bf16 := kept.get(("bf16", *key[1:]))) and bf16.median_ms and r.median_ms:
            kept[key] = replace(r, ratios=r.ratios | {"ours bf16": bf16.median_ms / r.median_ms})
    return list(kept.values())


def verdicts(found: Iterable) -> list[list[str]]:
    """For each number: what it is, what is asked, what the worst case reached, each case, and the verdict."""
    mine, lines = merged(found), []
    for t in TARGETS:
        values = {}
        for r in mine:
            fits = all(getattr(r, name) == x for name, x in ({"dtype": "bf16"} | t.wanted).items())
            if r.median_ms and fits and (v := getattr(r, t.value, None) or r.ratios.get(t.value)):
                values[f"{r.preset.upper()} {r.N}"] = v
        asked = f"{'at most' if t.at_most else 'at least'} {t.asked:g} {t.unit}"
        if not values:
            lines.append([t.name, asked, "-", "", "not measured"])
            continue
        worst = (max if t.at_most else min)(float(f"{v:.3g}") for v in values.values())  # as it is asked and shown
        said = "reached" if worst == t.asked or (worst < t.asked) == t.at_most else "missed"
        said += f" ({len(values)} of {t.cases} cases)" if len(values) < t.cases else ""
        lines.append([t.name, asked, f"{worst:.3g}", ", ".join(f"{c} {v:.3g}" for c, v in values.items()), said])
    return lines


HEAD = ["number", "asked", "worst case", "cases", "verdict"]

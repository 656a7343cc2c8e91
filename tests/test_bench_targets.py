"""The verdicts on the numbers to reach: from rows made by hand."""

import dataclasses

from bench import report, targets
from bench.rows import Row

GPU = {"impl": "ours", "dtype": "bf16", "device": "cuda"}
ATTENTION = Row("kernels", "attention", direction="fwd", B=64, N=1024, H=8, D=64, preset="s", median_ms=1.0, **GPU)
STEP = Row("model", "model", direction="step", B=32, N=1024, preset="m", median_ms=9.0, mfu=0.5, peak_gb=10.0, **GPU)


def verdict(name, *rows):
    return {line[0] + " " + line[1].split(" x ")[-1]: line[2:] for line in targets.verdicts(rows)}[name]


def test_nothing_is_claimed_without_rows():
    cpu = dataclasses.replace(ATTENTION, device="cpu", ratios={"sdpa": 9.0})
    assert {line[-1] for line in targets.verdicts([cpu])} == {"not measured"}
    assert {line[-1] for line in targets.verdicts([dataclasses.replace(cpu, device="cuda", median_ms=None)])} == {
        "not measured"
    }


def test_the_worst_case_against_the_best_peer_decides():
    short = dataclasses.replace(ATTENTION, ratios={"sdpa": 3.0, "sdpa cudnn": 1.2})
    long = dataclasses.replace(ATTENTION, N=4096, ratios={"sdpa cudnn": 1.05, "ours again": 0.5})
    worst, each, said = verdict("attention forward, D 64 the best peer", short, long)
    assert (worst, each) == ("1.05", "S 1024 1.2, S 4096 1.05")
    assert said == "missed (2 of 3 cases)"
    # Timed again beside another peer: both count.
    again = dataclasses.replace(ATTENTION, ratios={"flex": 1.01})
    assert verdict("attention forward, D 64 the best peer", short, again)[0] == "1.01"
    # And a later stage that had no time left takes nothing away.
    late = dataclasses.replace(ATTENTION, median_ms=None, note="not timed: no time was left")
    assert verdict("attention forward, D 64 the best peer", short, late)[0] == "1.2"
    assert "no time was left" not in report.speed([short, late], markdown=True)
    reached = [dataclasses.replace(short, N=n) for n in (1024, 2304, 4096)]
    assert verdict("attention forward, D 64 the best peer", *reached)[-1] == "reached"


def test_steps():
    fast = dataclasses.replace(STEP, ratios={"torch.compile": 1.2})
    assert verdict("training step torch.compile with cuDNN's SDPA", fast)[0] == "1.2"
    assert verdict("MFU, M at least 55 %", fast)[-1] == "missed"
    long = dataclasses.replace(STEP, N=4096, B=8, mfu=0.6, peak_gb=10.2)
    assert verdict("tokens/s at 4096 by the FLOP law the MFU at 1024", STEP, long)[0] == "1.2"
    assert verdict("memory at 4096, linear in N that of as many tokens at 1024", STEP, long)[-1].startswith("reached")
    quadratic = dataclasses.replace(long, peak_gb=40.0)
    assert verdict("memory at 4096, linear in N that of as many tokens at 1024", STEP, quadratic)[-1] == (
        "missed (1 of 3 cases)"
    )
    fewer = dataclasses.replace(long, B=4)  # it did not fit: no comparison
    assert verdict("memory at 4096, linear in N that of as many tokens at 1024", STEP, fewer)[-1] == "not measured"


def test_they_are_in_the_report_of_a_gpu_alone():
    titles = [title for title, _ in report.sections([ATTENTION], markdown=True)]
    assert "Numbers to reach on an H200 in bf16" in titles
    cpu = dataclasses.replace(ATTENTION, device="cpu")
    assert not any(title.startswith("Numbers") for title, _ in report.sections([cpu], markdown=True))

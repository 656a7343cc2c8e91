"""The verdicts on the numbers to reach: from rows made by hand."""

import dataclasses

from bench.report import readme, report, targets
from bench.rows import Row

GPU = {"impl": "ours", "dtype": "bf16", "device": "cuda"}
ATTENTION = Row("kernels", "attention", direction="fwd", B=64, N=1024, H=8, D=64, preset="s", median_ms=1.0, **GPU)
STEP = Row("model", "model", direction="step", B=32, N=1024, preset="m", median_ms=9.0, mfu=0.5, peak_gb=10.0, **GPU)


def verdict(name, *rows):
    return {line[0]: line[2:] for line in targets.verdicts(rows)}[name]


def test_nothing_is_claimed_without_rows():
    cpu = dataclasses.replace(ATTENTION, device="cpu", ratios={"sdpa cudnn": 9.0})
    for rows in ([cpu], [dataclasses.replace(cpu, device="cuda", median_ms=None)]):
        assert {line[-1] for line in targets.verdicts(rows)} == {"not measured"}


def test_the_worst_case_decides():
    short = dataclasses.replace(ATTENTION, ratios={"sdpa flash": 0.5, "sdpa cudnn": 1.2})
    long = dataclasses.replace(ATTENTION, N=4096, ratios={"sdpa cudnn": 1.01})
    worst, each, said = verdict("attention fwd, D 64", short, long)
    assert (worst, each) == ("1.01", "S 1024 1.2, S 4096 1.01")
    assert said == "missed (2 of 3 cases)"
    # Timed again beside another peer: both count, and a later stage that had no time left takes nothing away.
    again = dataclasses.replace(ATTENTION, ratios={"flex": 1.01})
    late = dataclasses.replace(ATTENTION, median_ms=None, note="not timed: no time was left")
    assert verdict("attention fwd, D 64", short, again, late)[0] == "1.2"
    assert "no time was left" not in report.speed([short, late])
    reached = [dataclasses.replace(short, N=n) for n in (1024, 2304, 4096)]
    assert verdict("attention fwd, D 64", *reached)[-1] == "reached"


def test_steps_and_tokens():
    fast = dataclasses.replace(STEP, ratios={"torch.compile": 1.2})
    assert verdict("step, M", fast)[-1] == "reached" and verdict("MFU of a step, M", fast)[-1] == "missed"
    token = dataclasses.replace(STEP, suite="sampling", op="decode", direction="token", B=1, N=544, median_ms=0.5504)
    assert verdict("a token at batch 1, M", token)[-1] == "reached"  # to the figures that are asked
    assert verdict("a token at batch 1, M", dataclasses.replace(token, median_ms=0.56))[-1] == "missed"
    narrow = dataclasses.replace(token, dtype="int8", median_ms=0.4)
    assert verdict("int8 weights at batch 1, M", token, narrow)[:1] == ["1.38"] and narrow.ratios == {}


def test_they_are_in_the_report_of_a_gpu_alone():
    titles = report.sections([ATTENTION])
    assert "Numbers to reach on an H200 in bf16" in titles
    cpu = dataclasses.replace(ATTENTION, device="cpu")
    assert not any(title.startswith("Numbers") for title in report.sections([cpu]))


def test_the_readme_says_what_its_rows_say():
    assert readme.main(["--check"]) == 0
    row = dataclasses.replace(ATTENTION, ratios={"sdpa cudnn": 0.876, "liger": 1.0, "torch.compile": 1.01})
    assert readme.ratio(row, "sdpa cudnn") == "0.88x, a loss" and readme.ratio(row, "liger", " Liger") == "1.00x Liger"
    assert readme.ratio(row, "torch.compile") == "**1.01x**" and readme.ratio(row, "eager") == ""

"""The compile gate: the committed baseline is whole and clean, today's binaries are no worse, and worse is red."""

from dataclasses import replace

import pytest

from bench import rows
from bench.compiled import gate
from bench.rows import CompileRow
from tests.test_compile import child

BASE = CompileRow(
    "compile", "attention", "attention_forward", "attention D64 bf16", "sm_90", "M128 N128 w8 s3", "3.7.1",
    "IS_CAUSAL", regs=168, shared=100_000, occupancy=0.25, mma=8, wgmma=8, tma=4, waits="1,0", exp2=64,
    exp2_under=60, ok=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"stack": 16}, "stack 0 -> 16"),
        ({"spill_loads": 2}, "spill_loads 0 -> 2"),
        ({"spill_stores": 2}, "spill_stores 0 -> 2"),
        ({"regs": 184}, "regs 168 -> 184"),
        ({"shared": 120_000}, "shared 100000 -> 120000"),
        ({"mma": 0}, "mma 8 -> 0"),
        ({"wgmma": 0}, "wgmma 8 -> 0"),
        ({"tma": 0}, "tma 4 -> 0"),
        ({"waits": "0,0"}, "waits 1,0 -> 0,0"),
        ({"exp2_under": 0}, "exp2_under 60 -> 0"),
        ({"occupancy": 0.125}, "occupancy 0.25 -> 0.125"),
        ({"ok": False, "note": "the compiler failed (SIGABRT)"}, "the compiler failed (SIGABRT)"),
    ],
)
def test_each_loss_is_told_in_words(change, words):
    (line,) = gate.compare([replace(BASE, tile="M128 N256 w8 s3", **change)], [BASE])
    assert words in line
    assert "attention_forward [IS_CAUSAL] attention D64 bf16 sm_90, M128 N128 w8 s3 -> M128 N256 w8 s3" in line


def test_what_is_no_loss():
    better = replace(BASE, regs=160, shared=50_000, occupancy=0.5, waits="1,1")
    assert gate.compare([better, replace(BASE, regs=BASE.regs + gate.REGISTERS)], [BASE]) == []
    assert gate.compare([replace(BASE, triton="3.6.0", stack=64), replace(BASE, case="new", stack=64)], [BASE]) == []


def test_the_baseline_has_every_binary_of_the_tables_and_no_red_one():
    """A tile that is changed without `make compile-baseline` is found here; one made to spill, with it, too."""
    assert not [r for r in gate.read() if not r.ok]
    done = child("-c", """
import triton
from bench.compiled import compile as c, gate
from bench.compiled.cases import cases
jobs, broken = c.plan(list(cases()), c.TARGETS)
assert not broken, broken
have = {r.key: r.tile for r in gate.read() if r.triton == triton.__version__}
want = {job.row.key: job.row.tile for job in jobs}
print(*(f"{k}: {have.get(k)} in the baseline, {t} now" for k, t in want.items() if have.get(k) != t), sep="\\n")
print(*(f"{k}: in the baseline only" for k in have.keys() - want.keys()), sep="\\n")
""")
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


def test_todays_binaries_are_no_worse_on_hopper(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = child("-m", "bench.compiled", "--quick", "--arch", "sm_90", "--out", str(out), timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows.read(out)
    assert len(found) > 30 and {r.key for r in found} <= {r.key for r in gate.read()}
    assert gate.compare(found, gate.read()) == []


def test_a_tile_that_is_made_to_spill_is_red(tmp_path):
    """In the table the forward's 128 x 64 of sm_80 becomes 256 x 256 for the same warps."""
    out = tmp_path / "rows.jsonl"
    done = child("-c", f"""
import dataclasses, sys
from bench.compiled.__main__ import main
from igpt.kernels import tiles
tile = tiles.ATTENTION_FORWARD["sm_80", 64]
tiles.ATTENTION_FORWARD["sm_80", 64] = dataclasses.replace(tile, BLOCK_M=256, BLOCK_N=256, num_stages=2)
options = ["--arch", "sm_80", "--case", "attention D64 bf16", "--quick", "--out", {str(out)!r}]
sys.exit(main(options))
""", timeout=600)
    assert done.returncode == 1, done.stderr[-3000:]
    lines = gate.compare(rows.read(out), gate.read())
    assert any("spill_loads 0 -> " in x and "M128 N64 w8 s3 -> M256 N256 w8 s2" in x for x in lines), lines

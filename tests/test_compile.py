"""The compile suite: what it sees in a binary, on kernels whose faults are planted (tests/compile_samples.py).

Kernels decide at import whether they are interpreted, as here, or compiled: so each test asks a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import rows
from bench.compiled import gate
from bench.compiled.compile import exp2_under

ROOT = Path(__file__).resolve().parents[1]
FULL = "attention D64 bf16 full", "attention D96 bf16 full", "attention D128 bf16 full"


def child(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("compile") / "rows.jsonl"
    done = child("-m", "bench.compiled", "--cases", "tests.compile_samples", "--out", str(out))
    assert done.returncode == 1, done.stderr[-2000:]
    return {(r.case, r.arch): r for r in rows.read(out)}


def test_a_good_kernel_is_green_on_every_architecture(samples):
    for arch in ("portable", "sm_80", "sm_90", "sm_100", "gfx942"):
        row = samples["good", arch]
        assert row.ok and row.regs > 32 and row.mma > 0 and row.stack == 0 and 0 < row.occupancy <= 1, row
    hopper = samples["good", "sm_90"]
    assert hopper.wgmma > 0 and hopper.waits and hopper.tile == "M128 N128 K64 w8 s2" and hopper.dots == 1


def test_a_spilled_kernel_is_red(samples):
    row = samples["spills", "sm_90"]
    assert not row.ok and row.stack > 0 and row.spill_loads > 0 and "spills" in row.note


@pytest.mark.parametrize("order, under", [
    ("HMMA MUFU wait0 MUFU", 0), ("open close MUFU wait0 MUFU", 1), ("open MUFU close wait0", 1),
    ("close close wait1 MUFU wait0 MUFU", 1), ("close wait0 MUFU close", 0),
])  # fmt: skip
def test_exponentials_under_products_are_counted(order, under):
    lines = {
        "open": "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR28], R24 ;", "MUFU": "@P0 MUFU.EX2 R3, R4 ;",
        "close": "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], R24, gsb0 ;", "HMMA": "HMMA.16816.F32.BF16 R4, R8, R4 ;",
        "wait0": "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "wait1": "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
    }  # fmt: skip
    assert exp2_under("\n".join(lines[name] for name in order.split())) == under


def test_tma_descriptors_are_seen(samples):
    assert samples["tma", "sm_90"].ok and samples["tma", "sm_90"].tma > 0
    assert samples["tma", "sm_100"].ok and samples["tma", "sm_100"].tma > 0


def test_a_failing_compile_names_kernel_tile_and_architecture(samples):
    row = samples["broken", "sm_90"]
    assert not row.ok and "power of 2" in row.note
    assert (row.function, row.arch, row.tile) == ("broken", "sm_90", "M96 w4 s3")


def test_a_launcher_that_raises_is_red(samples):
    assert not samples["refused", "sm_90"].ok and "expected 4" in samples["refused", "sm_90"].note


def test_an_aborting_compiler_costs_one_row():
    done = child("-c", """
import os, dataclasses
from bench.compiled import compile as c
from tests.compile_samples import cases
jobs, _ = c.plan([x for x in cases() if x.name == "good"], ["sm_90", "sm_80"])
real = c.compile_launch
c.compile_launch = lambda launch: os.abort() if launch.arch == "sm_90" else real(launch)
rows = {r.arch: r for r in c.compile_all(jobs)}
assert not rows["sm_90"].ok and "SIGABRT" in rows["sm_90"].note, rows["sm_90"]
assert rows["sm_80"].ok
c.compile_launch = lambda launch: __import__("time").sleep(60)
(late,) = c.compile_all(jobs[:1], limit_s=0.5)
assert "time limit" in late.note
""")
    assert done.returncode == 0, done.stderr


def test_every_launcher_is_captured_without_a_gpu():
    """Every operation on every architecture reaches its launches; custom ops get their fakes back afterwards."""
    done = child("-c", """
from bench.compiled import compile as c
from bench.compiled.cases import cases, meta
quick = [x for x in cases() if x.quick]
for arch in c.TARGETS:
    jobs, broken = c.plan(quick, [arch])
    assert not broken, [(r.case, r.note) for r in broken]
    assert len(jobs) >= 12, len(jobs)
from igpt import ops
assert ops.norm(meta(4, 64), meta(64), impl="triton").shape == (4, 64)  # the fake again: no driver is asked for
""")
    assert done.returncode == 0, done.stderr


def test_a_step_is_accounted_for():
    """The launches' FLOPs are those of the formula, of the one product that two backward kernels both do, and of the
    embedding's gradient, a product with a one-hot where the formula counts a sum."""
    done = child("-c", """
from dataclasses import replace
from bench.cases import VOCAB, model_case
from bench.compiled import step
rows, case = step.account("tiny", 2, 256), model_case("tiny", 2, 256, "bf16", "fwd+bwd")
want = case.cost().flops
again = case.config.n_layer * replace(case, op="attention", direction="fwd").cost().flops
onehot = 2 * case.T * VOCAB * case.d
have = sum(r.flops for r in rows)
assert abs(have - want - again - onehot) < 1e-6 * want, (have, want, again, onehot)
names = {r.kernel for r in rows}
assert any("attention_hopper_backward" in n for n in names) and any("norm_forward" in n for n in names), names
# Autograd once filled a gradient with zeros for each output that backward never reads: 8% of a step's bytes.
assert not {r.kernel for r in rows} & {"zeros", "copy_"}, rows
""")
    assert done.returncode == 0, done.stderr


def test_a_gpus_stages_launch_what_was_compiled_before():
    """Compiling on one core takes a stage's seconds: its steps, ViT's and what decoding begins with."""
    done = child("-c", """
import torch
from bench import gpu
from bench.compiled import compile as c
from bench.compiled.cases import meta
from bench.compiled.step import launched
from bench.speed import tune
from igpt import ImageGPT, ViT
from igpt.kernels.quantize import quantize_rows
from igpt.sample.draw import Sampler
from igpt.sample.kernel_decoder import KernelDecoder
jobs, broken = c.plan(gpu.cases(), ["sm_90"])
assert not broken, broken
compiled = {job.launch.key for job in jobs}
# A launch of one tile a program fills no ring twice, and is red for it: the tuner then tried no tile of these.
jobs += c.plan([x for x in tune.cases() if x.name.startswith("ATTENTION_HOPPER")], ["sm_90"])[0]
rings = [job.launch for job in jobs if job.row.function.startswith("attention_hopper")]
assert rings and all(x.values["WORK"] > x.grid[0] for x in rings), [(x.values["WORK"], x.grid) for x in rings]
how = {"impl": "triton", "device": "meta", "dtype": torch.bfloat16}
for preset, B in (("s", 1), ("l", 128)):
    with c.capture("sm_90") as launches, torch.no_grad():
        model = ImageGPT.from_preset(preset, **how)
        for weights in (None, "int8"):
            decoder = KernelDecoder(model, B, weights=weights, cache_dtype="bf16")
            decoder.prefill(meta(B, 480).long())
            decoder.draw(Sampler())
    missing = {x.name for x in launches if x.key not in compiled}
    assert launches and not missing, (preset, B, missing)
with c.capture("sm_90") as launches:
    launched(ImageGPT.from_preset("m", n_ctx=2304, **how), meta(14, 2304).long())
    launched(ViT.from_preset("vit-b16", **how), meta(128, 224, 224, 3, dtype=torch.uint8), meta(128).long())
    quantize_rows(meta(4096, 512))
    quantize_rows(meta(2048, 512).t())
missing = {x.name for x in launches if x.key not in compiled}
assert launches and not missing, missing
""")
    assert done.returncode == 0, done.stderr


def test_head_counts_share_a_binary():
    """Triton specialises an integer that is 1 or that 16 divides: H, its products and the groups are exempt."""
    done = child("-c", """
from bench.compiled import compile as c
from bench.cases import Case
from bench.compiled.cases import of
for arch in "sm_80", "sm_90":
    cases = [of(Case("attention", B, 1024, H, 64, "bf16"), f"H{H}") for B, H in ((1, 1), (3, 2), (32, 16))]
    functions = [job.row.function for job in c.plan(cases, [arch])[0]]
    assert len(functions) == 3, functions
""")
    assert done.returncode == 0, done.stderr


def overlaps(row) -> bool:
    """No spill, wgmma, waits of ours that leave a product in flight, and the exponentials under it: all 64 of either
    consumer's loop in a forward, whose first block has no product to be under, and all but a few of a backward's."""
    backward = "backward" in row.function
    exps = row.exp2_under >= (0.95 * row.exp2 if backward else 2 * 64)  # ptxas had put the wait for that product first
    return row.ok and row.stack == 0 and row.wgmma >= (24 if backward else 48) and gate.waits_left(row) >= 2 and exps


def test_the_hopper_kernels_overlap_their_products(tmp_path):
    """Their own binaries, full; of the causal ones the baseline's, below which test_compile_gate.py lets none fall. And
    ptxas has neither serialised wgmma nor made it wait."""
    out = tmp_path / "rows.jsonl"
    done = child("-c", f"""
import triton
from bench import rows
from bench.compiled import compile as c
from bench.compiled.cases import cases
triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
jobs, _ = c.plan([x for x in cases() if x.name in {FULL}], ["sm_90"])
found = [c.judged(job, c.compile_launch(job.launch)) for job in jobs if "hopper" in job.row.function]
open({str(out)!r}, "w").writelines(rows.to_json(row) + "\\n" for row in found)
""")
    assert done.returncode == 0, done.stderr
    full = rows.read(out)
    causal = [r for r in gate.read() if f"{r.case} full" in FULL and r.arch == "sm_90" and "hopper" in r.function
              and r.triton == full[0].triton]  # fmt: skip
    assert len(full) == len(causal) == 9  # D = 64, 96, 128: forward, dq, dk and dv
    assert not [row for row in (*full, *causal) if not overlaps(row)]
    assert done.stdout.count("Compiling entry function") == 9, done.stdout  # or there is no log to read
    assert "serialized" not in done.stdout and "wait is injected" not in done.stdout

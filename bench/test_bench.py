"""The case table under pytest-benchmark: `pytest bench --benchmark-only`, to compare two commits.

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare

Kernels run on a GPU; without one, the torch path; the host's time for a block is always a CPU's (speed/host.py).
Correctness is bench/run.py's business and the tests'.
"""

import time

import pytest
import torch

from bench import cases
from bench.cases import model_case
from bench.speed import host, models
from bench.speed.measure import call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, TOKENS = ("bf16", 65536) if DEVICE == "cuda" else ("fp32", 1024)
PIXELS = [cases.Case(op, 16, 1024, 1, 64, "fp32") for op in cases.PIXEL_OPS]
OPERATIONS = [*cases.speed(["s"], [1024], [DTYPE], ("fwd", "fwd+bwd"), TOKENS), *PIXELS]
MODELS = [model_case("s", max(1, TOKENS // 2048), 1024, DTYPE, direction) for direction in ("fwd", "fwd+bwd")]


def run(benchmark, case, fn, rounds: int) -> None:
    """Wall time of a GPU's work ends with the work."""
    ended = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    benchmark.extra_info.update(case.labels, flops=case.cost().flops, bytes=case.cost().bytes)
    benchmark.pedantic(lambda: (fn(), ended()), warmup_rounds=1, rounds=rounds)


@pytest.mark.parametrize("case", OPERATIONS, ids=lambda c: f"{c.op} D{c.D}{'' if c.causal else ' full'} {c.direction}")
@pytest.mark.parametrize("impl", ["ours", "eager"])
def test_operation(benchmark, case, impl):
    fn = case.ours() if impl == "ours" else case.reference()
    run(benchmark, case, call(fn, case.inputs(DEVICE), case.diff, case.direction), rounds=5)


@pytest.mark.parametrize("case", MODELS, ids=lambda c: f"{c.preset} {c.direction}")
def test_model(benchmark, case):
    run(benchmark, case, models.build("ours", case, DEVICE), rounds=3)


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("direction", host.DIRECTIONS)
@pytest.mark.parametrize("arch", ["sm_90", "portable"])
def test_host_time_of_a_block(benchmark, arch, direction):
    with host.unlaunched(arch):
        benchmark(host.block(direction))

"""The case table under pytest-benchmark: `pytest bench --benchmark-only`, to compare two commits.

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare

Kernels run on a GPU; without one, the torch path; the host's time for a block is always a CPU's. Correctness is
bench/run.py's business and the tests'.
"""

import contextlib
import time
import warnings
from unittest import mock

import pytest
import torch

from bench import cases
from bench.speed import measure, models
from igpt import ImageGPT
from igpt.kernels import choose, device
from igpt.kernels.launching import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE, TOKENS = ("bf16", 65536) if DEVICE == "cuda" else ("fp32", 1024)
CASES = [
    *cases.speed(["s"], [1024], [DTYPE], ("fwd", "fwd+bwd"), TOKENS),
    *(cases.Case(op, 16, 1024, 1, 64, "fp32") for op in cases.PIXEL_OPS),
    *cases.sized("model", ["s"], ("fwd", "fwd+bwd"), TOKENS // 2, 1024, DTYPE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} D{c.D}{'' if c.causal else ' full'} {c.direction}")
@pytest.mark.parametrize("impl", ["ours", "eager"])
def test_case(benchmark, case, impl):
    """Wall time of a GPU's work ends with the work."""
    fn = (models if case.is_whole else measure).build(impl, case, DEVICE)
    ended = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    benchmark.extra_info.update(case.labels, flops=case.cost().flops, bytes=case.cost().bytes)
    benchmark.pedantic(lambda: (fn(), ended()), warmup_rounds=1, rounds=3 if case.is_whole else 5)


@pytest.fixture(params=["sm_90", "portable"])
def unlaunched(request):
    """On a CPU what that architecture would do, up to the launches: our kernels are handed to a recorder that drops
    them, the vendor's products only allocate. What is left is what Python, the dispatcher and autograd cost. Not in it
    is a launch's own cost, which is the same for everybody who launches as many."""

    def mm(a, b):
        return a.new_empty((a.shape[0], b.shape[1]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # that a kernel of PyTorch's is replaced
        stack.enter_context(torch.library._scoped_library("aten", "IMPL")).impl("mm", mm, "CPU")
        stack.enter_context(mock.patch.object(device, "INTERPRETED", True))  # check_device lets the CPU pass
        stack.enter_context(mock.patch.object(choose, "HAS_ONEDNN", False))
        stack.enter_context(device.target(request.param))
        stack.enter_context(recording(lambda *_: None))
        yield


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_host_time_of_a_block(benchmark, unlaunched, direction):
    """One block of S on 128 tokens in bf16, from the stream to the stream, and back to every gradient."""
    block = ImageGPT.from_preset("s", impl="triton", device="meta", dtype=torch.bfloat16, n_layer=1).blocks[0]
    block.to_empty(device="cpu")
    shape = 1, 128, block.attn.norm.shape[0]
    stream, add = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    gradients, wanted = [torch.zeros(shape, dtype=torch.bfloat16)] * 2, [stream, add, *block.parameters()]

    def forward():
        return block(stream, add, "triton")

    benchmark(forward if direction == "fwd" else lambda: torch.autograd.grad(forward(), wanted, gradients))

"""Kernels for test_compile.py: a good product, one with TMA, one with too big a tile, one that doesn't compile."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compiled.cases import CompileCase, meta
from igpt.kernels.launching import launch


@triton.jit
def product(a, b, c, K, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        b_a = tl.load(a + o_m[:, None] * stride + k + o_k[None, :])
        b_b = tl.load(b + o_n[:, None] * stride + k + o_k[None, :])
        acc = tl.dot(b_a, b_b.T, acc)
    tl.store(c + o_m[:, None] * BLOCK_N + o_n[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def product_tma(a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([0, k]), b.load([0, k]).T, acc)
    c.store([0, 0], acc.to(tl.bfloat16))


@triton.jit
def broken(a, BLOCK_M: tl.constexpr):
    tl.store(a + tl.arange(0, BLOCK_M), 0.0)


def run_product(m, n, k, warps):
    a, b, c = meta(m, 512), meta(n, 512), meta(m, n)
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    launch(product, (1,), a=a, b=b, c=c, K=512, stride=512, **sizes, num_warps=warps, num_stages=2)


def run_tma():
    a, b, c = (TensorDescriptor.from_tensor(meta(128, 512), [128, 64]) for _ in range(3))
    c = TensorDescriptor.from_tensor(meta(128, 128), [128, 128])
    launch(product_tma, (1,), a=a, b=b, c=c, K=512, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8)


def run_broken():
    launch(broken, (1,), a=meta(96), BLOCK_M=96, num_warps=4)


def run_refused():
    raise ValueError("q: got rank 2, expected 4")


def cases():
    yield CompileCase("good", lambda: run_product(128, 128, 64, 8))
    yield CompileCase("spills", lambda: run_product(256, 256, 64, 4), archs=("sm_90",))
    yield CompileCase("tma", run_tma, archs=("sm_90", "sm_100"))
    yield CompileCase("broken", run_broken, archs=("sm_90",))
    yield CompileCase("refused", run_refused, archs=("sm_90",))

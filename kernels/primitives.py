"""Device helpers shared by the kernels, named for the maths."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
QUICK_GELU: tl.constexpr = tl.constexpr(1.702)


@triton.jit
def sigmoid(x):
    # exp2 of a negated value: no overflow to worry about, 1/(1 + inf) is the right limit.
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def quick_gelu(x):
    """x sigmoid(1.702 x) in fp32."""
    return x * sigmoid(x * QUICK_GELU)


@triton.jit
def quick_gelu_grad(x):
    """d quick_gelu / dx = s + 1.702 x s (1 - s), s = sigmoid(1.702 x)."""
    s = sigmoid(x * QUICK_GELU)
    return s * (1.0 + x * QUICK_GELU * (1.0 - s))

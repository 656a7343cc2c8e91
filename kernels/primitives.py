"""Device helpers shared by the kernels, named for the maths."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
QUICK_GELU: tl.constexpr = tl.constexpr(1.702)
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
NORMAL_PEAK: tl.constexpr = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


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


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def gelu(x):
    """x P(X <= x) of a standard normal X, in fp32."""
    return x * normal_cdf(x)


@triton.jit
def gelu_grad(x):
    """d gelu / dx = P(X <= x) + x p(x)."""
    return normal_cdf(x) + x * NORMAL_PEAK * tl.exp2(x * x * -0.5 * LOG2E)

"""Device helpers shared by the kernels, named for the maths, and the checks every launcher makes."""

import torch
import triton
import triton.language as tl

from .interpreter import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
QUICK_GELU: tl.constexpr = tl.constexpr(1.702)


@triton.jit
def sigmoid(x):
    # exp2 of a negated value: no overflow to worry about, 1/(1 + inf) is the right limit.
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def quick_gelu(x):
    """x sigmoid(1.702 x) in fp32."""
    return x * sigmoid(1.702 * x)


@triton.jit
def quick_gelu_grad(x):
    """d quick_gelu / dx = s + 1.702 x s (1 - s), s = sigmoid(1.702 x)."""
    s = sigmoid(1.702 * x)
    return s * (1.0 + 1.702 * x * (1.0 - s))


def check_device(name: str, *tensors: torch.Tensor | None) -> None:
    """Kernels run on a GPU or, with TRITON_INTERPRET=1 set before import, in the interpreter. Never silently elsewhere.

    Raises ValueError if a tensor is neither on a GPU nor (interpreted) on the CPU, if devices differ, or if they are a
    GPU other than the current one, where Triton would launch."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"{name}: tensors on several devices {sorted(map(str, devices))}; expected one")
    device = next(iter(devices))
    kind = device.type
    if kind not in ("cuda", "meta") and not (kind == "cpu" and INTERPRETED):
        raise ValueError(
            f"{name}: the Triton kernels need a GPU (got tensors on {kind}), or TRITON_INTERPRET=1 in the environment "
            "before igpt is imported; use impl='torch' or impl='auto' here"
        )
    if kind == "cuda" and device.index != (current := torch.cuda.current_device()):
        raise ValueError(
            f"{name}: got tensors on {device}, expected the current device, cuda:{current}, where Triton launches; "
            "see torch.cuda.set_device"
        )

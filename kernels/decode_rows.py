"""One decoding step's norms and products for many pictures: the vendor's products, a kernel of ours between them.

    x += add;  n = norm(x)                             decode_norm           (B, d) -> (R, d)
    y = rows @ weight^T + bias                         decode_product        (R, K), (O, K) -> (R, O)

From some ten pictures on the products are the vendor's: at 128 its kernels take 4.5 to 8.6 us each for the presets S to
L, where a matrix-vector kernel would multiply longer than it reads. The R rows are B filled up to a multiple of ROWS,
and the vendor is given ROWS at a time: with equal shapes it sums in one order, so a picture's numbers don't depend on
how many others there are. What the rows past B hold is never read for a picture.
"""

import torch
import triton

from . import checks
from .device import check_device
from .launching import launch
from .norm import norm_forward_kernel
from .registration import operation

ROWS = 128


@operation(
    "decode_norm(Tensor(a!) x, Tensor? add, Tensor gain, float eps, bool centred, ScalarType dtype) -> Tensor",
    lambda x, *options: x.new_empty((triton.cdiv(x.shape[0], ROWS) * ROWS, x.shape[1]), dtype=options[-1]),
)
def decode_norm_op(x, add, gain, eps: float, centred: bool, dtype, n) -> None:
    B, d = x.shape
    launch(
        norm_forward_kernel, (B,),
        x=x, add=add, gain=gain.contiguous(), n=n, stats=x.new_empty((2, B), dtype=torch.float32), s=x, M=B, d=d,
        stride_x=d, stride_add=d, eps=eps, HAS_ADD=add is not None, IS_CENTRED=centred,
        BLOCK_M=1, BLOCK_D=triton.next_power_of_2(d), num_warps=4,
    )  # fmt: skip


def decode_norm(x, add, gain, *, eps: float = 1e-5, centred: bool = False, dtype: torch.dtype):
    """Add the first rows of `add` (R, d), if given, to the residual stream x (B, d) in place; its norm times gain (d)
    in `dtype`, (R, d). Raises ValueError for operands that don't fit."""
    B, d = x.shape
    if not x.is_contiguous():
        checks.refuse("decode_norm", "x", f"strides {x.stride()}", "contiguous (B, d)")
    checks.operand("decode_norm", "add", add, (triton.cdiv(B, ROWS) * ROWS, d))
    checks.operand("decode_norm", "gain", gain, (d,))
    check_device("decode_norm", x, add, gain)
    return decode_norm_op(x, add, gain, eps, centred, dtype)


def decode_product(rows, weight, bias=None):
    """rows @ weight^T + bias: (R, K), (O, K), (O) -> (R, O), R a multiple of ROWS."""
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    for a, out in zip(rows.split(ROWS), y.split(ROWS)):
        if bias is None:
            torch.mm(a, weight.t(), out=out)
        else:
            torch.addmm(bias, a, weight.t(), out=out)
    return y

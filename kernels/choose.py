"""Which implementation runs an operation: decided here alone, from facts.

    kernels           the Triton kernels, or the torch path: by `impl`, device and dtype
    attention         the same for attention, whose kernels take some head dims
    warp_specialised  attention's Gluon kernels (attention_hopper*.py), or the plain ones
    matrix_vector     a decoding step's products: matrix-vector kernels, or the vendor's
    onednn            the torch path on a CPU: functions over oneDNN's products (igpt/ops/cpu.py), or plain PyTorch
    mkl               these functions' products: PyTorch's own, or oneDNN's
    blocks            its attention: by blocks (igpt/ops/cpu_attention.py), or SDPA
    packs             decoding's weights on a CPU: packed for oneDNN, or as they are for MKL
"""

import functools
import importlib.util
import os
import platform
from pathlib import Path

import torch

from . import checks

IMPLS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take
MAX_HEAD_DIM = 128  # wider accumulators would not fit the registers
FEW_PICTURES = 8  # a guess: no machine was asked yet where the vendor's products begin to win
HAS_TRITON = importlib.util.find_spec("triton") is not None  # Linux only; elsewhere the torch path is all there is
if HAS_TRITON:
    from .device import arch, check_device
    from .interpreter import INTERPRETED
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Where attention by blocks was measured quicker than SDPA, by processor and dtype. SDPA multiplies through MKL, which
# on AMD stops at AVX2. On 2 cores of an Intel Xeon with AVX-512 (2026-11-28, N 1024, H 8, D 64) it takes 7.3 ms to the
# blocks' 10.9 in fp32 and 11.5 to 15.4 in bf16, with backward 25.9 to 45.7 and 45 to 58. IGPT_CPU names another
# processor.
BLOCKS = {
    ("AuthenticAMD", torch.float32): "2 Zen 5 cores, 2026-11-21: 1.2x forward, 1.1x with backward",
    ("AuthenticAMD", torch.bfloat16): "2 Zen 5 cores, 2026-11-21: 1.6x forward, 1.1x with backward",
}
MKL_ROWS = 1024  # a guess between the two sizes that were asked
MIN_POSITIONS = 512  # below, a head's dozens of calls cost more than its arithmetic (256: 0.7x of SDPA)
MAX_THREADS = 4  # a block's product is too small to feed more; SDPA shares out heads instead


def kernels(impl: str, x: torch.Tensor) -> bool:
    """True if the Triton kernels run on x. Raises ValueError for an unknown impl, or "triton" where they cannot run."""
    if impl == "auto":
        return HAS_TRITON and x.is_cuda and (x.dtype in FLOATS or not x.is_floating_point()) and not checks.is_vmap()
    if impl == "torch":
        return False
    if impl != "triton":
        raise ValueError(f"impl: got {impl!r}, expected one of {IMPLS}")
    if not HAS_TRITON:
        raise ValueError("impl='triton': Triton is not installed; expected impl='torch' or 'auto'")
    if checks.is_vmap():
        raise ValueError("impl='triton': the kernels take no batch of vmap's; expected impl='torch' or 'auto'")
    check_device("impl='triton'", x)
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise ValueError(f"impl='triton': got {x.dtype}, expected one of {FLOATS}; fp64 runs with impl='torch'")
    return True


def attention(impl: str, q: torch.Tensor) -> bool:
    """The same for q (..., D): "auto" leaves head dims to SDPA that the kernels refuse."""
    return kernels(impl, q) and (impl == "triton" or takes_head_dim(q.shape[-1]))


def takes_head_dim(D: int) -> bool:
    return 0 < D <= MAX_HEAD_DIM and D % 16 == 0


def warp_specialised(*views: torch.Tensor) -> bool:
    """For views (B, N, H, D) of one shape, all that a launch reads and writes: on sm_90 where TMA can take them."""
    return arch(views[0].device) == "sm_90" and not INTERPRETED and takes_views(*views)


def takes_views(*tensors: torch.Tensor) -> bool:
    """Whether these views (B, N, H, D) of one shape suit the Gluon kernels: fp16 or bf16, heads side by side, rows and
    pictures that start at 16 bytes, fewer than 2^30 rows in tiles of 128, of which backward counts two statistics in
    one int32."""
    (B, N, H, D), dtype = tensors[0].shape, tensors[0].dtype
    if D not in (64, 96, 128) or dtype not in (torch.float16, torch.bfloat16) or B * H * -(-N // 128) >= 1 << 23:
        return False
    for t in tensors:
        picture, row, head, column = t.stride()
        starts = row > 0 and row % 8 == 0 and (B == 1 or (picture > 0 and picture % 8 == 0))
        if not (starts and head == D and column == 1 and t.dtype == dtype and t.data_ptr() % 16 == 0):
            return False
    return True


def matrix_vector(pictures: int) -> bool:
    """For how many pictures are drawn in all: the two differ as roundings do, and a picture's bits must not depend on
    the batch that it is drawn in."""
    return pictures <= FEW_PICTURES


def onednn(x: torch.Tensor) -> bool:
    """A CPU tensor, fp32 or bf16, outside of torch.compile and of torch.func, whose transforms plain PyTorch knows."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not checks.is_transformed()
    )


def mkl(x: torch.Tensor) -> bool:
    """Whether a CPU's product of these rows is PyTorch's own. In fp32 that is MKL's, which on AMD stops at AVX2; on an
    Intel Xeon with AVX-512 (2026-11-28) it takes 3 to 10% less than oneDNN's of 1024 rows of S or 4160 of vit-tiny, and
    for a weight's gradient, whose operand oneDNN has copied, 8 to 24% less; of 197 rows of vit-b16 10 to 19% more."""
    return x.dtype == torch.float32 and len(x) >= MKL_ROWS and processor() == "GenuineIntel"


def blocks(q: torch.Tensor) -> bool:
    """For q (B, N, ...): a processor they win on, enough positions, few enough threads."""
    return (
        onednn(q)
        and q.shape[1] >= MIN_POSITIONS
        and torch.get_num_threads() <= MAX_THREADS
        and (processor(), q.dtype) in BLOCKS
    )


def packs(weight: torch.Tensor, rows: int) -> bool:
    """Whether a decoding step's product of `rows` rows reads a weight that oneDNN has packed. One core of an Intel Xeon
    with AVX-512 (2026-11-28) streams S's fp32 weights 6 to 14% quicker through MKL up to 3 rows, and 22% slower from 4
    on; bf16's through oneDNN always."""
    return onednn(weight) and not (weight.dtype == torch.float32 and rows < 4 and processor() == "GenuineIntel")


@functools.cache
def processor() -> str:
    """The CPU's vendor as it names itself, or IGPT_CPU."""
    if named := os.environ.get("IGPT_CPU"):
        return named
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)
    return named or platform.processor()

"""The others: for each operation and for the whole model, peers by name.

A peer is built for a case: a callable that takes the case's inputs. What can't run here raises, Absent where we know
why, and is listed with its words.
"""

import functools
import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases import PIXEL_OPS, Case
from igpt.kernels import reference

# torch.compile tries Triton's products for minutes a shape unless told: the vendor's alone, unless there is time.
GEMMS = os.environ.setdefault("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN")
COMPILED_NOTE = f"on a GPU max-autotune, products by {'cuBLAS alone' if GEMMS == 'ATEN' else GEMMS}"


class Absent(Exception):
    """Why a peer is not run."""


def require_gpu(device: str) -> None:
    if device != "cuda":
        raise Absent("needs a GPU")


def compiled(fn: Callable, device: str) -> Callable:
    """torch.compile of a function; max-autotune on a GPU, launched one by one."""
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Absent("torch.compile needs a C++ compiler")
    return torch.compile(fn, dynamic=False, mode="max-autotune-no-cudagraphs" if device == "cuda" else None)


def eager(case: Case, device: str):
    return case.reference()


def operands(name: str, case: Case, inputs: dict) -> tuple[dict, tuple[str, ...]]:
    """What a variant is given, and with respect to what it is differentiated. Attention's peers get q, k and v as
    tensors of their own, as they like them best: of a packed qkv autograd would have to stack their gradients."""
    if case.op != "attention" or name not in UNPACKED:
        return inputs, case.diff
    return {n: t.contiguous() for n, t in zip("qkv", inputs["qkv"].unbind(2))}, ("q", "k", "v")


def fused_attention(q, k, v, causal: bool, scale=None, fn=F.scaled_dot_product_attention):
    """torch's, or a function that takes the same, on heads (B, N, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return fn(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def sdpa(case: Case, device: str, backend: SDPBackend | None = None):
    """torch's fused attention: its own choice, or one backend forced."""
    fused = functools.partial(fused_attention, causal=case.causal)
    if backend is None:
        return fused
    require_gpu(device)
    return sdpa_kernel(backend)(fused)


def flex(case: Case, device: str):
    """With its own tiles: autotuning them takes a minute a shape."""
    require_gpu(device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, run = None, torch.compile(flex_attention, dynamic=False)
    if case.causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.N, case.N, device=device)

    def blocked(q, k, v, is_causal, scale):
        return run(q, k, v, block_mask=mask, scale=scale)

    return functools.partial(fused_attention, causal=case.causal, fn=blocked)


def flash4(case: Case, device: str):
    require_gpu(device)
    from flash_attn.cute import flash_attn_func

    def run(q, k, v):
        out = flash_attn_func(q, k, v, causal=case.causal)
        return out[0] if isinstance(out, tuple) else out

    return run


def compiled_reference(case: Case, device: str):
    """torch.compile of what a careful user would write: SDPA for attention, the reference for the rest."""
    return compiled(sdpa(case, device) if case.op == "attention" else case.reference(), device)


def liger(case: Case, device: str):
    """Liger-Kernel's norm, or its fused linear cross-entropy behind its norm."""
    require_gpu(device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as HeadLoss
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Norm

    def norm(x, weight):
        return Norm.apply(x, weight, 1e-5, 0.0, "llama", False)

    def head_loss(x, norm_weight, head_weight, targets):
        n = norm(x, norm_weight).flatten(0, -2)
        loss = HeadLoss.apply(n, head_weight, targets.flatten(), None, None, -100, 0.0, 0.0, "none")
        return (loss[0] if isinstance(loss, tuple) else loss).view(targets.shape)

    def norm_mlp(x, norm_weight, w_fc, w_proj):
        return x + F.linear(reference.quick_gelu(F.linear(norm(x, norm_weight), w_fc)), w_proj)

    def norm_linear(x, norm_weight, weight):
        return F.linear(norm(x, norm_weight), weight)

    if case.op == "head_loss" and case.direction == "bwd":
        raise Absent("Liger makes the head's gradients in its forward: compare fwd+bwd")
    known = {"norm": norm, "head_loss": head_loss, "norm_mlp": norm_mlp, "norm_linear": norm_linear}
    if case.op not in known:
        raise Absent(f"Liger has no {case.op}")
    return known[case.op]


ATTENTION = {
    "eager": eager,
    "torch.compile": compiled_reference,
    "sdpa": sdpa,
    "sdpa cudnn": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": functools.partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "sdpa efficient": functools.partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "flex": flex,
    "flash-attn 4": flash4,
}
UNPACKED = ATTENTION.keys() - {"eager"}
OTHERS = {"eager": eager, "torch.compile": compiled_reference, "liger": liger}

WHOLE = ("hugging face", "hugging face patched", "torch.compile graphed", "ours fp8")  # bench/speed/models.py
NAMES = (*dict.fromkeys([*ATTENTION, *OTHERS]), *WHOLE)


def of(case: Case) -> dict[str, Callable]:
    """The peers of a case's operation, by name: of the palettes', whose reference is numpy's, only that."""
    if case.op in PIXEL_OPS:
        return {"eager": eager}
    return ATTENTION if case.op == "attention" else OTHERS

"""The operations of the model. `impl` is "auto", "triton" or "torch"; kernels/choose.py says what then runs.

- "triton": the kernels, on a GPU or (TRITON_INTERPRET=1) in the interpreter; anywhere else a ValueError, never a
  fall-back.
- "torch": the quickest exact PyTorch path: on a CPU cpu.py and cpu_attention.py; elsewhere SDPA for
  attention and the activation's constants in the alpha of the MLP's products.
- "auto": "triton" for fp16, bf16 and fp32 tensors on a GPU, but under torch.func.vmap, "torch" otherwise.

Bad arguments raise ValueError before any work (kernels/checks.py). Parameters are cast to the activations' dtype
here, so fp32 parameters under bf16 activations get fp32 gradients. Meanings, formulas and sources:
`igpt/kernels/reference.py`, function by function.

`fp8`: the operation's products, and backward's with its weights, in 8 bits (kernels/fp8.py), for training in bf16.

The residual stream is a sum that its next norm finishes. `add`: what is added to x before the norm. `through`: return
(y, s), s = x + add, for the next operation; a gradient that comes back to s is added in the pass that makes x's own.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from igpt.kernels import checks, choose, reference
from igpt.kernels.choose import HAS_TRITON, IMPLS
from igpt.kernels.fp8 import Linear as LinearInFP8
from igpt.ops import cpu, cpu_attention

if HAS_TRITON:
    from igpt.kernels import attention as attention_kernel
    from igpt.kernels import decode_attention as decode_attention_kernel
    from igpt.kernels import embedding as embedding_kernel
    from igpt.kernels import head_loss as head_loss_kernel
    from igpt.kernels import norm as norm_kernel
    from igpt.kernels import norm_linear as norm_linear_kernel
    from igpt.kernels import norm_mlp as norm_mlp_kernel
    from igpt.kernels import palette as palette_kernel
    from igpt.kernels import quantize as quantize_kernel

DISTANCES = 1 << 19  # of pixels from colours, held at once by the torch path: 15 MB, as each takes 28 bytes at work
__all__ = ["IMPLS"]


def attention(q, k=None, v=None, *, causal: bool, scale: float | None = None, impl: str = "auto"):
    """Attention of q, k, v, each (B, N, H, D), or of one packed qkv (B, N, 3, H, D) -> (B, N, H, D).

    Any strides with a contiguous last dimension, no copies; scale defaults to 1/sqrt(D). D must be a multiple of 16 up
    to 128 for the kernels. Exact softmax attention in every form; no N x N buffer."""
    packed = k is None and v is None
    if (k is None) != (v is None):
        raise ValueError("k, v: got one of them, expected both, or neither with q a packed (B, N, 3, H, D)")
    if choose.attention(impl, q):
        if packed:
            return attention_kernel.attention_packed(q, causal, scale)
        return attention_kernel.attention(q, k, v, causal, scale)
    checks.attention_packed(q) if packed else checks.attention(q, k, v)
    if choose.blocks(q):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cpu_attention.Attention.apply(causal, scale, *((q,) if packed else (q, k, v)))
    q, k, v = q.unbind(2) if packed else (q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def decode_attention(qkv, k_cache, v_cache, position, scale: float | None = None, *, impl: str = "auto"):
    """Attention of one new position, whose key and value are written into the caches: qkv (B, 3, H, D), caches (B, H,
    n_ctx, D) of any float dtype -> (B, H, D).

    position: one integer in [0, n_ctx) on qkv's device, which the kernels never bring to the host: outside of it they
    give NaN and write nothing. scale defaults to 1/sqrt(D)."""
    checks.decode_attention(qkv, k_cache, v_cache)
    if position.numel() != 1 or position.is_floating_point():
        checks.refuse("decode_attention", "position", checks.said(position), "one integer")
    if choose.kernels(impl, qkv):
        position = position.reshape(1).expand(len(qkv))
        return decode_attention_kernel.decode_attention(qkv, k_cache, v_cache, position, scale)
    n = int(position)
    if not 0 <= n < k_cache.shape[2]:
        raise ValueError(f"position: got {n}, expected an integer in [0, {k_cache.shape[2]})")
    q, *new = qkv.unbind(1)
    for cache, x in zip((k_cache, v_cache), new):
        top = torch.finfo(cache.dtype).max
        cache[:, :, n] = x.clamp(-top, top) if cache.element_size() == 1 else x  # a cast to fp8 overflows to NaN
    k, v = (cache[:, :, : n + 1].to(qkv.dtype) for cache in (k_cache, v_cache))
    return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)[:, :, 0]


def norm(x, weight, *, eps: float = 1e-5, centred: bool = False, impl: str = "auto"):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension (centred=True: of x - mean(x)), (..., d)."""
    weight = weight.to(x.dtype)
    if choose.kernels(impl, x):
        return norm_kernel.norm(x, weight, eps, centred)
    checks.norm("norm", x, None, weight)
    return _rows(cpu.Norm, x, weight, eps, centred) if choose.onednn(x) else reference.norm(x, weight, eps, centred)


def norm_linear(
    x, norm_weight, weight, bias=None,
    *, add=None, through: bool = False, eps: float = 1e-5, centred: bool = False, fp8: bool = False,
    impl: str = "auto",
):  # fmt: skip
    """norm(x + add) @ weight^T + bias: (..., d), weight (out, d) -> (..., out), or with `through` (y, x + add)."""
    norm_weight, weight, bias = _cast(x.dtype, norm_weight, weight, bias)
    if choose.kernels(impl, x):
        return norm_linear_kernel.norm_linear(x, norm_weight, weight, bias, eps, centred, add, through, fp8)
    checks.norm_linear(x, add, norm_weight, weight, bias)
    x = x if add is None else x + add
    if choose.onednn(x) and not fp8:
        y = _rows(cpu.NormLinear, x, norm_weight, weight, bias, eps, centred)
    else:
        n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")
        y = linear(n, weight, bias, fp8=fp8, impl="torch")
    return (y, x) if through else y


def linear(x, weight, bias=None, *, fp8: bool = False, impl: str = "auto"):
    """x @ weight^T + bias by the vendor's product: (..., d), weight (out, d) -> (..., out)."""
    weight, bias = _cast(x.dtype, weight, bias)
    if fp8:
        checks.fp8("linear", x, weight)
        is_kernel = choose.kernels(impl, x)
        quantize = quantize_kernel.quantize_rows_op if is_kernel else reference.quantize_rows
        return LinearInFP8.apply(x, weight, bias, quantize)
    return _rows(cpu.Linear, x, weight, bias) if choose.onednn(x) else F.linear(x, weight, bias)


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None,
    *, add=None, through: bool = False, eps: float = 1e-5, centred: bool = False, activation: str = "quick_gelu",
    recompute: bool = False, fp8: bool = False, impl: str = "auto",
):  # fmt: skip
    """s + activation(norm(s) @ w_fc^T + b_fc) @ w_proj^T + b_proj, s = x + add: (..., d), w_fc (inner, d), w_proj (d,
    inner), activation "quick_gelu" or "gelu" (exact). With `through` what the next operation takes as (add, x): the two
    summands, or (None, their sum) where the sum cost nothing.

    recompute: backward makes the activation again from its argument, so that only one (..., inner) is kept."""
    norm_weight, w_fc, w_proj, b_fc, b_proj = _cast(x.dtype, norm_weight, w_fc, w_proj, b_fc, b_proj)
    if choose.kernels(impl, x):
        return norm_mlp_kernel.norm_mlp(
            x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, recompute, add, through, activation, fp8
        )
    checks.norm_mlp(x, add, norm_weight, w_fc, w_proj, b_fc, b_proj, activation)
    x = x if add is None else x + add
    if fp8:
        y = _fp8_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, activation, recompute)
    elif choose.onednn(x):
        how = eps, centred, activation, torch.is_grad_enabled(), recompute
        y = _rows(cpu.NormMLP, x, norm_weight, w_fc, w_proj, b_fc, b_proj, *how)
    else:
        y = _torch_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, activation, recompute)
    return (None, y) if through else y


def _torch_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, activation, recompute):
    n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")
    act = cpu.ACTIVATIONS[activation]
    # Both constants ride in the products' alpha, the residual in beta: of the elementwise passes only the function is
    # left.
    pre = _addmm(None if b_fc is None else act.scale * b_fc, n, w_fc, alpha=act.scale)

    def out(pre):
        return _addmm(x if b_proj is None else x + b_proj, act.function(pre), w_proj, alpha=1 / act.scale)

    return _kept(out, pre, recompute)


def _fp8_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, activation, recompute):
    n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")

    def out(pre):
        hidden = reference.ACTIVATIONS[activation](pre.float()).to(x.dtype)
        return x + linear(hidden, w_proj, b_proj, fp8=True, impl="torch")

    return _kept(out, linear(n, w_fc, b_fc, fp8=True, impl="torch"), recompute)


def _kept(function, pre, recompute: bool):
    """function(pre), which backward calls again where its insides are not to be kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, pre, use_reentrant=False, preserve_rng_state=False)
    return function(pre)


def embed(tokens, wte, wpe, sos=None, masked=None, *, dtype: torch.dtype | None = None, impl: str = "auto"):
    """Token plus position embedding: tokens (B, N) int, wte (V, d), wpe (n_ctx >= N, d) -> (B, N, d).

    sos (d): AR, shifted right behind the start vector. masked (B, N) bool: BERT, masked token embeddings times 0.
    dtype: of the result (default wte's). Token ids outside of [0, V) raise on a CPU; on a GPU their rows are NaN."""
    checks.integers("embed", "tokens", tokens, wte.shape[0])
    tables = _cast(dtype or wte.dtype, wte, wpe, sos)
    if choose.kernels(impl, tables[0]):
        return embedding_kernel.embed(tokens, *tables, masked)
    checks.embed(tokens, wte, wpe, sos, masked)
    # Wide tables: a colour's gradient is a sum of thousands, which would stand still in half precision.
    wte, wpe, sos = _cast(torch.promote_types(wte.dtype, torch.float32), wte, wpe, sos)
    return reference.embed(*_with_row_outside(tokens, wte, torch.nan), wpe, sos, masked).to(tables[0].dtype)


def head_loss(x, norm_weight, head_weight, targets, *, eps: float = 1e-5, centred: bool = False, impl: str = "auto"):
    """Nats of each target behind final norm and head: x (..., d), head_weight (V, d), targets (...) -> (...), at least
    fp32. Target ids outside of [0, V) raise on a CPU; on a GPU their loss is NaN."""
    checks.integers("head_loss", "targets", targets, head_weight.shape[0])
    norm_weight, head_weight = _cast(x.dtype, norm_weight, head_weight)
    if choose.kernels(impl, x):
        return head_loss_kernel.head_loss(x, norm_weight, head_weight, targets, eps, centred)
    checks.head_loss(x, norm_weight, head_weight, targets)
    n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")
    logits, targets = reference.wide(linear(n, head_weight)), targets.long()
    is_outside = (targets < 0) | (targets >= head_weight.shape[0])  # only where nobody could read them
    inside = targets.masked_fill(is_outside, 0)
    nll = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), inside.flatten(), reduction="none").view(targets.shape)
    return nll.masked_fill(is_outside, torch.nan)


def palette_encode(pixels, palette, *, impl: str = "auto"):
    """Index of the nearest colour, the lowest on ties: uint8 or float (..., 3), palette fp32 (k, 3) -> int64 (...).

    For pictures on a CPU use `igpt.Palette.encode`, whose exact table is far quicker than this brute force."""
    if choose.kernels(impl, pixels):
        return palette_kernel.palette_encode(pixels, palette)
    checks.palette_encode(pixels, palette)
    parts = pixels.reshape(-1, 3).split(_pixels_at_once(palette))
    return torch.cat([reference.palette_encode(part, palette) for part in parts]).view(pixels.shape[:-1])


def palette_decode(tokens, palette, *, impl: str = "auto"):
    """Colours of tokens: int (...), palette fp32 (k, 3) -> uint8 (..., 3). Tokens outside of [0, k) raise on a CPU; on
    a GPU they are black."""
    checks.integers("palette_decode", "tokens", tokens, palette.shape[0])
    if choose.kernels(impl, tokens):
        return palette_kernel.palette_decode(tokens, palette)
    checks.palette_decode(tokens, palette)
    return reference.palette_decode(*_with_row_outside(tokens, palette, -1.0))


def palette_sums(colours, weight, palette, *, impl: str = "auto"):
    """A step of k-means: nearest colours, int64 (n,), and each palette colour's sums of weight * (1, r, g, b), int64
    (4, k), of distinct colours uint8 (n, 3) with their counts int64 (n,)."""
    if choose.kernels(impl, colours):
        return palette_kernel.palette_sums(colours, weight, palette)
    checks.palette_sums(colours, weight, palette)
    parts = zip(*(t.split(_pixels_at_once(palette)) for t in (colours, weight)))
    index, sums = zip(*(reference.palette_sums(*part, palette) for part in parts))
    return torch.cat(index), sum(sums)


def _pixels_at_once(palette) -> int:
    return max(1, DISTANCES // palette.shape[0])


def _with_row_outside(ids, table, value: float):
    """Where ids could not be read, without a synchronisation: those outside of the table mean one more row of it."""
    if checks.is_readable(ids):
        return ids, table
    ids, count = ids.long(), len(table)
    return torch.where((ids >= 0) & (ids < count), ids, count), F.pad(table, (0, 0, 0, 1), value=value)


def _rows(function, x, *args):
    """Apply an autograd function of 2-D activations to (..., d) ones."""
    y = function.apply(x.reshape(-1, x.shape[-1]), *args)
    return y.view(*x.shape[:-1], y.shape[-1])


def _addmm(added, a, weight, alpha: float = 1.0):
    """added + alpha a @ weight^T in one product (`added` may be None, a row, or a full residual)."""
    rows, shape = a.reshape(-1, a.shape[-1]), (*a.shape[:-1], weight.shape[0])
    if added is None:
        out = rows.new_zeros(())  # beta = 0: never read
        return torch.addmm(out, rows, weight.t(), beta=0, alpha=alpha).view(shape)
    added = added.flatten(0, -2) if added.dim() > 1 else added
    return torch.addmm(added, rows, weight.t(), alpha=alpha).view(shape)


def _cast(dtype, *tensors):
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]

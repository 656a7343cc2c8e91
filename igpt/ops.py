"""The only place where an operation chooses how it runs: `impl` is "auto", "triton" or "torch".

- "triton": the kernels, on a GPU or (TRITON_INTERPRET=1) in the interpreter; anywhere else a ValueError, never a
  fall-back.
- "torch": the quickest exact PyTorch path: on a CPU igpt/cpu.py and igpt/cpu_attention.py; elsewhere SDPA for
  attention, addmm with the activation's constants and the residual in its alpha and beta for the MLP.
- "auto": "triton" for fp16, bf16 and fp32 tensors on a GPU, "torch" otherwise.

Each function checks its arguments before any work and raises ValueError naming the argument, what came and what was
expected. Parameters are cast to the activations' dtype here, so fp32 parameters under bf16 activations get fp32
gradients. Meanings, formulas and sources: `igpt/kernels/reference.py`, function by function.
"""

import importlib.util
import os

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from igpt import cpu, cpu_attention
from igpt.kernels import reference

HAS_TRITON = importlib.util.find_spec("triton") is not None  # Linux only; elsewhere the torch path is all there is
if HAS_TRITON:
    from igpt.kernels import attention as attention_kernel
    from igpt.kernels import decode_attention as decode_attention_kernel
    from igpt.kernels import embedding as embedding_kernel
    from igpt.kernels import head_loss as head_loss_kernel
    from igpt.kernels import norm as norm_kernel
    from igpt.kernels import norm_linear as norm_linear_kernel
    from igpt.kernels import norm_mlp as norm_mlp_kernel
    from igpt.kernels import palette as palette_kernel
    from igpt.kernels.primitives import check_device

IMPLS = ("auto", "triton", "torch")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Token range on a GPU costs a synchronisation, so there it is opt-in; on a CPU it is always checked.
CHECK_TOKENS_ON_GPU = os.environ.get("IGPT_CHECK_TOKENS", "0") == "1"


def resolve(impl: str, x: torch.Tensor) -> bool:
    """True if the Triton kernels run on x. Raises ValueError for an unknown impl, or "triton" where they cannot run."""
    if impl not in IMPLS:
        raise ValueError(f"impl: got {impl!r}, expected one of {IMPLS}")
    if impl == "triton":
        if not HAS_TRITON:
            raise ValueError("impl='triton': Triton is not installed; expected impl='torch' or 'auto'")
        check_device("impl='triton'", x)
        if x.is_floating_point() and x.dtype not in FLOATS:
            raise ValueError(f"impl='triton': got {x.dtype}, expected one of {FLOATS}; fp64 runs with impl='torch'")
        return True
    return HAS_TRITON and impl == "auto" and x.is_cuda and (x.dtype in FLOATS or not x.is_floating_point())


def attention(q, k=None, v=None, *, causal: bool, scale: float | None = None, impl: str = "auto"):
    """Attention of q, k, v, each (B, N, H, D), or of one packed qkv (B, N, 3, H, D) -> (B, N, H, D).

    Any strides with a contiguous last dimension, no copies; scale defaults to 1/sqrt(D). D must be a multiple of 16 up
    to 128 for the kernels. Exact softmax attention in every form; no N x N buffer."""
    packed = k is None and v is None
    if (k is None) != (v is None):
        raise ValueError("k, v: got one of them, expected both, or neither with q a packed (B, N, 3, H, D)")
    if packed and (q.dim() != 5 or q.shape[2] != 3):
        raise ValueError(f"q: got shape {tuple(q.shape)} and no k, v; expected a packed (B, N, 3, H, D)")
    if not packed:
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 4:
                raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected (B, N, H, D)")
            if t.dtype != q.dtype or t.shape != q.shape:
                raise ValueError(
                    f"{name}: got {t.dtype} {tuple(t.shape)}, expected q's {q.dtype} {tuple(q.shape)}"
                )
    if not q.is_floating_point():
        raise ValueError(f"q: got {q.dtype}, expected a floating dtype")
    if resolve(impl, q):
        if packed:
            return attention_kernel.attention_packed(q, causal, scale)
        return attention_kernel.attention(q, k, v, causal, scale)
    if cpu_attention.suits(q):
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
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv: got {qkv.dtype} {tuple(qkv.shape)}, expected floats (B, 3, H, D)")
    B, _, H, D = qkv.shape
    _shape("k_cache", k_cache, (B, H, None, D))
    _shape("v_cache", v_cache, tuple(k_cache.shape))
    if resolve(impl, qkv):
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
    _floating("x", x)
    _shape("weight", weight, (x.shape[-1],))
    weight = weight.to(x.dtype)
    if resolve(impl, x):
        return norm_kernel.norm(x, weight, eps, centred)
    return _rows(cpu.Norm, x, weight, eps, centred) if cpu.suits(x) else reference.norm(x, weight, eps, centred)


def norm_linear(
    x, norm_weight, weight, bias=None,
    *, eps: float = 1e-5, centred: bool = False, through: bool = False, impl: str = "auto",
):  # fmt: skip
    """norm(x) @ weight^T + bias: (..., d), weight (out, d) -> (..., out).

    through: return (y, x). A residual connection that reads this x hands its gradient back through this operation,
    where the kernels add it in the pass that makes x's own."""
    _floating("x", x)
    _shape("norm_weight", norm_weight, (x.shape[-1],))
    _shape("weight", weight, (None, x.shape[-1]))
    _shape("bias", bias, (weight.shape[0],))
    norm_weight, weight, bias = _cast(x.dtype, norm_weight, weight, bias)
    if resolve(impl, x):
        return norm_linear_kernel.norm_linear(x, norm_weight, weight, bias, eps, centred, through)
    if cpu.suits(x):
        y = _rows(cpu.NormLinear, x, norm_weight, weight, bias, eps, centred)
    else:
        y = F.linear(norm(x, norm_weight, eps=eps, centred=centred, impl="torch"), weight, bias)
    return (y, x) if through else y


def linear(x, weight):
    """x @ weight^T by the vendor's product, which no kernel of ours is to beat: (..., d), (out, d) -> (..., out)."""
    weight = weight.to(x.dtype)
    return _rows(cpu.Linear, x, weight, None) if cpu.suits(x) else F.linear(x, weight)


def linear_residual(a, weight, residual, bias=None, *, impl: str = "auto"):
    """residual + a @ weight^T + bias: (..., in), weight (out, in), residual (..., out) -> (..., out)."""
    _floating("a", a)
    _shape("weight", weight, (None, a.shape[-1]))
    _shape("residual", residual, (*a.shape[:-1], weight.shape[0]))
    _shape("bias", bias, (weight.shape[0],))
    weight, residual, bias = _cast(a.dtype, weight, residual, bias)
    if resolve(impl, a):
        return norm_linear_kernel.linear_residual(a, weight, residual, bias)
    if cpu.suits(a):
        return residual + _rows(cpu.Linear, a, weight, bias)
    return _addmm(residual if bias is None else residual + bias, a, weight)


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None,
    *, eps: float = 1e-5, centred: bool = False, recompute: bool = False, impl: str = "auto",
):  # fmt: skip
    """x + quick_gelu(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj: (..., d), w_fc (inner, d), w_proj (d, inner).

    recompute: backward makes quick_gelu's result again from its argument, so that only one (..., inner) is kept."""
    _floating("x", x)
    d = x.shape[-1]
    _shape("norm_weight", norm_weight, (d,))
    _shape("w_fc", w_fc, (None, d))
    _shape("w_proj", w_proj, (d, w_fc.shape[0]))
    _shape("b_fc", b_fc, (w_fc.shape[0],))
    _shape("b_proj", b_proj, (d,))
    norm_weight, w_fc, w_proj, b_fc, b_proj = _cast(x.dtype, norm_weight, w_fc, w_proj, b_fc, b_proj)
    if resolve(impl, x):
        return norm_mlp_kernel.norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, recompute)
    if cpu.suits(x):
        training = torch.is_grad_enabled()
        return _rows(cpu.NormMLP, x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, training, recompute)
    return _torch_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, recompute)


def _torch_norm_mlp(x, norm_weight, w_fc, w_proj, b_fc, b_proj, eps, centred, recompute):
    n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")
    # quick_gelu(h) = silu(1.702 h) / 1.702: both constants ride in the products' alpha, the residual in beta, so that
    # of the elementwise passes only silu is left.
    bias = None if b_fc is None else reference.QUICK_GELU * b_fc
    pre = _addmm(bias, n, w_fc, alpha=reference.QUICK_GELU)

    def out(pre):
        hidden = F.silu(pre, inplace=not torch.is_grad_enabled())
        return _addmm(x if b_proj is None else x + b_proj, hidden, w_proj, alpha=1 / reference.QUICK_GELU)

    return checkpoint(out, pre, use_reentrant=False) if recompute and torch.is_grad_enabled() else out(pre)


def embed(tokens, wte, wpe, sos=None, masked=None, *, dtype: torch.dtype | None = None, impl: str = "auto"):
    """Token plus position embedding: tokens (B, N) int, wte (V, d), wpe (n_ctx >= N, d) -> (B, N, d).

    sos (d): AR, shifted right behind the start vector. masked (B, N) bool: BERT, masked token embeddings times 0.
    dtype: of the result (default wte's). Tokens are range-checked on a CPU, and on a GPU with IGPT_CHECK_TOKENS=1."""
    _tokens("tokens", tokens, wte.shape[0])
    _shape("wte", wte, (None, None))
    _shape("wpe", wpe, (None, wte.shape[1]))
    _shape("sos", sos, (wte.shape[1],))
    if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= wpe.shape[0]:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (B, N) with 1 <= N <= {wpe.shape[0]}")
    if masked is not None and (masked.shape != tokens.shape or masked.dtype != torch.bool):
        raise ValueError(f"masked: got {masked.dtype} {tuple(masked.shape)}, expected bool {tuple(tokens.shape)}")
    wte, wpe, sos = _cast(dtype or wte.dtype, wte, wpe, sos)
    if resolve(impl, wte):
        return embedding_kernel.embed(tokens, wte, wpe, sos, masked)
    return reference.embed(tokens, wte, wpe, sos, masked)


def head_loss(
    x, norm_weight, head_weight, targets, token_weights=None,
    *, reduction: str = "mean", eps: float = 1e-5, centred: bool = False, impl: str = "auto",
):  # fmt: skip
    """Final norm, head and cross-entropy: x (..., d), head_weight (V, d), targets (...) -> nats, at least fp32.

    reduction "none": nll of each position (...); "mean": their mean; with token_weights (...): sum(weights * nll)."""
    _floating("x", x)
    _shape("norm_weight", norm_weight, (x.shape[-1],))
    _shape("head_weight", head_weight, (None, x.shape[-1]))
    _shape("targets", targets, x.shape[:-1])
    _shape("token_weights", token_weights, x.shape[:-1])
    _tokens("targets", targets, head_weight.shape[0])
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean' or 'none'")
    norm_weight, head_weight = _cast(x.dtype, norm_weight, head_weight)
    if resolve(impl, x):
        nll = head_loss_kernel.head_loss(x, norm_weight, head_weight, targets, eps, centred)
    else:
        n = norm(x, norm_weight, eps=eps, centred=centred, impl="torch")
        logits = linear(n, head_weight)
        logits = reference.wide(logits).flatten(0, -2)
        nll = F.cross_entropy(logits, targets.long().flatten(), reduction="none").view(targets.shape)
    if token_weights is not None:
        return (nll * token_weights).sum()
    return nll if reduction == "none" else nll.mean()


def palette_encode(pixels, palette, *, impl: str = "auto"):
    """Index of the nearest colour, the lowest on ties: uint8 or float (..., 3), palette fp32 (k, 3) -> int64 (...).

    For pictures on a CPU use `igpt.Palette.encode`, whose exact table is far quicker than this brute force."""
    _palette(palette)
    if pixels.shape[-1:] != (3,) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
        raise ValueError(f"pixels: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 or float (..., 3)")
    if resolve(impl, pixels):
        return palette_kernel.palette_encode(pixels, palette).long()
    return reference.palette_encode(pixels, palette)


def palette_decode(tokens, palette, *, impl: str = "auto"):
    """Colours of tokens: int (...), palette fp32 (k, 3) -> uint8 (..., 3)."""
    _palette(palette)
    _tokens("tokens", tokens, palette.shape[0])
    if resolve(impl, tokens):
        return palette_kernel.palette_decode(tokens, palette)
    return reference.palette_decode(tokens, palette)


def palette_sums(colours, weight, palette, *, impl: str = "auto"):
    """A step of k-means: nearest colours, int64 (n,), and each palette colour's sums of weight * (1, r, g, b), int64
    (4, k), of distinct colours uint8 (n, 3) with their counts int64 (n,)."""
    if resolve(impl, colours):
        return palette_kernel.palette_sums(colours, weight, palette)
    return reference.palette_sums(colours, weight, palette)


def _rows(function, x, *args):
    """Apply an autograd function of 2-D activations to (..., d) ones."""
    y = function.apply(x.flatten(0, -2), *args)
    return y.view(*x.shape[:-1], y.shape[-1])


def _addmm(added, a, weight, alpha: float = 1.0):
    """added + alpha a @ weight^T in one product (`added` may be None, a row, or a full residual)."""
    rows = a.flatten(0, -2)
    if added is None:
        out = rows.new_zeros(())  # beta = 0: never read
        return torch.addmm(out, rows, weight.t(), beta=0, alpha=alpha).view(*a.shape[:-1], -1)
    added = added.flatten(0, -2) if added.dim() > 1 else added
    return torch.addmm(added, rows, weight.t(), alpha=alpha).view(*a.shape[:-1], -1)


def _cast(dtype, *tensors):
    return [t if t is None else t.to(dtype) for t in tensors]


def _floating(name, x):
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected a floating (..., d)")


def _shape(name, tensor, shape):
    """None in `shape` is any size; a tensor that is None passes."""
    if tensor is None:
        return
    if tensor.dim() != len(shape) or any(want is not None and have != want for have, want in zip(tensor.shape, shape)):
        want = tuple("any" if s is None else s for s in shape)
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {want}")


def _tokens(name, tokens, vocab):
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name}: got {tokens.dtype}, expected integers in [0, {vocab})")
    checked = tokens.device.type == "cpu" or (tokens.is_cuda and CHECK_TOKENS_ON_GPU)
    # A traced graph cannot branch on values; there the gather's own bounds check is what remains.
    if checked and tokens.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in torch.aminmax(tokens.long()))
        if low < 0 or high >= vocab:
            raise ValueError(f"{name}: got values in [{low}, {high}], expected integers in [0, {vocab})")


def _palette(palette):
    if palette.dim() != 2 or palette.shape[1] != 3 or not palette.is_floating_point():
        raise ValueError(f"palette: got {palette.dtype} {tuple(palette.shape)}, expected a floating (k, 3)")

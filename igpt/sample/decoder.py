"""One pixel at a time: the key-value cache, prefill, and the step that turns a pixel into the next one's logits.

    decoder = decoder_of(model, batch)
    decoder.prefill(tokens[:, :keep])                  # with the training kernels
    logits = decoder.step(keep, tokens[:, keep - 1])   # (B, V) fp32: of pixel `keep`

All pictures are in lock-step and of one length, so the cache is one contiguous tensor, allocated once. Weights are
prepared once: gains and quick_gelu's constants folded in (norm(x) W = rstd (x (g W))), packed by oneDNN on a CPU,
bf16 or int8 (one scale an output channel) when asked for. The residual stream, the norms and the logits are at least
fp32; so are, on a CPU, the cache and attention, where half-precision attention of one query is several times slower.
"""

import math
import warnings

import torch
import torch.nn.functional as F

from igpt import ops
from igpt.kernels import choose
from igpt.kernels.reference import QUICK_GELU
from igpt.machine import available_bytes
from igpt.ops import cpu

WEIGHTS = (None, "bf16", "int8")
CACHES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
# How many pictures at once where nobody says. An H200 (2026-11-27, S in bf16) draws 15 a second 16 at a time and 64
# with 128, whose keys and values are 20 times the weights' bytes by then: more would gain little. A core of an Intel
# Xeon (2026-11-28, S in fp32, position 512) takes 14.1, 10.2, 7.9 and 6.7 ms for a pixel of one of 4, 8, 16 and 32.
BATCHES = {"cuda": 128, "cpu": 32}


def quantise(weight: torch.Tensor):
    """int8 weights and fp32 scales of each output channel: weight ~ int8 * scale[:, None], symmetric."""
    scale = weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Product:
    """a @ weight^T + bias for few rows, with the weight stored as the machine reads it quickest."""

    def __init__(self, weight, bias, rows: int, kind: str | None):
        self.dtype = torch.bfloat16 if kind else weight.dtype
        self.bias = None if bias is None else bias.to(self.dtype)
        self.scale = None
        if kind == "int8":
            self.weight, scale = quantise(weight)
            self.scale = scale.to(self.dtype)
        else:
            self.weight = weight.to(self.dtype).contiguous()
        self.packed = kind != "int8" and choose.packs(self.weight, rows)
        # torch's int8 product is a CPU's, and reads past the end of rows that are no multiple of its 16 columns.
        self.pack_mm = kind == "int8" and weight.device.type == "cpu" and weight.shape[1] % 32 == 0
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)

    def __call__(self, a, activation: str = "none"):
        a = a.to(self.dtype)
        if self.packed:
            return cpu.onednn_product(a, self.weight, self.bias, activation)
        if self.scale is None:
            y = F.linear(a, self.weight, self.bias)
        else:
            if self.pack_mm:
                y = torch._weight_int8pack_mm(a, self.weight, self.scale)
            else:
                y = F.linear(a, self.weight.to(self.dtype)) * self.scale
            y = y if self.bias is None else y.add_(self.bias)
        return F.silu(y, inplace=True) if activation == "swish" else y


class Layer:
    """One block's products; 1.702 rides in fc, 1 / 1.702 in the MLP's proj (quick_gelu(h) = silu(1.702 h) / 1.702)."""

    def __init__(self, block, rows: int, kind: str | None):
        a, m = block.attn, block.mlp
        self.scale = a.scale
        self.qkv = Product(a.qkv * a.norm, a.b_qkv, rows, kind)
        self.proj = Product(a.proj, a.b_proj, rows, kind)
        b_fc = None if m.b_fc is None else m.b_fc * QUICK_GELU
        self.fc = Product(m.fc * (m.norm * QUICK_GELU), b_fc, rows, kind)
        self.out = Product(m.proj / QUICK_GELU, m.b_proj, rows, kind)


class Decoder:
    """Decodes `batch` pictures of `model` in lock-step with plain PyTorch operations.

    weights: None (the parameters' dtype), "bf16" or "int8"; cache_dtype: None (fp32 or wider on a CPU, the products'
    dtype on a GPU), "fp32", "bf16" or "fp8". total: how many pictures are drawn in all, `batch` at a time (default:
    batch); kernels choose their form by it, so that pictures don't depend on the split. Raises ValueError for a BERT
    model, an unknown option, or a cache that doesn't fit, before allocating it."""

    @torch.no_grad()
    def __init__(
        self, model, batch: int, *, weights: str | None = None, cache_dtype: str | None = None, total: int | None = None
    ):
        c = model.config
        check_options(model, batch, weights, cache_dtype)
        self.model, self.batch, self.config, self.total = model, batch, c, max(batch, total or 0)
        self.device = model.wte.device
        self.dtype = torch.bfloat16 if weights else model.wte.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        stored = stored_dtype(model, weights, cache_dtype)
        check_memory(model, batch, stored.itemsize)
        self.cache = torch.empty(c.n_layer, 2, batch, c.heads, c.n_ctx, c.head_dim, dtype=stored, device=self.device)
        self.prepare(weights)

    def prepare(self, weights: str | None) -> None:
        """Lay the weights out for `step`."""
        model = self.model
        self.attended = self.wide if self.cache.dtype == torch.float8_e4m3fn else self.cache.dtype
        self.layers = [Layer(block, self.batch, weights) for block in model.blocks]
        self.wte, self.wpe, self.sos = (t.to(self.wide) for t in (model.wte, model.wpe, model.sos))
        self.head = Product(model.head.to(self.wide) * model.norm_f.to(self.wide), None, self.batch, None)

    @torch.inference_mode()
    def prefill(self, tokens_BN):
        """Fill the cache with positions 0 .. N - 1: the start vector and the first N - 1 of N tokens."""
        c, model, (B, N) = self.config, self.model, tokens_BN.shape
        form = {"eps": c.norm_eps, "centred": c.centred, "impl": model.impl}
        h = ops.embed(tokens_BN, model.wte, model.wpe, model.sos, dtype=self.dtype, impl=model.impl)
        add = None
        for block, cache in zip(model.blocks, self.cache):
            a = block.attn
            qkv, h = ops.norm_linear(h, a.norm, a.qkv, a.b_qkv, add=add, through=True, **form)
            qkv = qkv.view(B, N, 3, c.heads, c.head_dim)
            cache[:, :, :, :N] = self.stored(qkv[:, :, 1:]).permute(2, 0, 3, 1, 4)
            n = ops.attention(qkv, causal=True, scale=a.scale, impl=model.impl)
            add, h = block.mlp(h, ops.linear(n.reshape(B, N, -1), a.proj, a.b_proj), model.impl)

    @torch.inference_mode()
    def step(self, position: int, previous_B):
        """Logits (B, V), at least fp32, of the pixel at `position`, given the one before it (unread at position 0)."""
        c, B = self.config, self.batch
        h = self.wpe[position] + (self.wte[previous_B] if position else self.sos.expand(B, -1))
        keys, values = (t.unbind(0) for t in self.cache[..., : position + 1, :].unbind(1))
        slots = self.cache[..., position, :].unbind(0)
        for layer, slot, k, v in zip(self.layers, slots, keys, values):
            qkv = layer.qkv(self.normed(h)).view(B, 3, c.heads, c.head_dim).transpose(0, 1)
            slot.copy_(self.stored(qkv[1:]))
            q, k, v = (t.to(self.attended) for t in (qkv[0, :, :, None], k, v))
            a = F.scaled_dot_product_attention(q, k, v, scale=layer.scale)
            h += layer.proj(a.view(B, -1))
            h += layer.out(layer.fc(self.normed(h), "swish"))
        return self.head(self.normed(h))

    @torch.inference_mode()
    def sample(self, tokens_BN, start: int, stop: int, sampler, progress=None):
        """Draw the pixels start .. stop - 1 into `tokens_BN`, given those before and a cache filled up to `start`."""
        c, B = self.config, self.batch
        for i, noise in zip(range(start, stop), sampler.noise(B, c.vocab, start, stop, self.device)):
            tokens_BN[:, i] = sampler(self.step(i, tokens_BN[:, i - 1]), noise)
            if progress is not None:
                progress(B)

    def stored(self, kv):
        """Keys and values as the cache can hold them: a cast to fp8, which has no infinity, would overflow to NaN."""
        top = torch.finfo(self.cache.dtype).max
        return kv.clamp(-top, top) if self.cache.dtype == torch.float8_e4m3fn else kv

    def normed(self, h):
        c = self.config
        return F.layer_norm(h, (c.width,), eps=c.norm_eps) if c.centred else F.rms_norm(h, (c.width,), eps=c.norm_eps)


def check_options(model, batch, weights, cache_dtype):
    if not model.config.causal:
        raise ValueError("objective: got 'bert', expected 'ar': only an autoregressive model can generate")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: got {batch!r}, expected a positive integer")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, expected one of {WEIGHTS}")
    if cache_dtype is not None and cache_dtype not in CACHES:
        raise ValueError(f"cache_dtype: got {cache_dtype!r}, expected None or one of {tuple(CACHES)}")


def stored_dtype(model, weights: str | None, cache_dtype: str | None) -> torch.dtype:
    """Of the cache."""
    dtype = torch.bfloat16 if weights else model.wte.dtype
    own = dtype if model.wte.device.type == "cuda" else torch.promote_types(dtype, torch.float32)
    return CACHES.get(cache_dtype, own)


def batch_of(
    model, total: int, most: int | None = None, *, weights: str | None = None, cache_dtype: str | None = None
) -> int:
    """How many of `total` pictures to draw at once, in equal parts: `most` at most, by default BATCHES, or what fits
    the memory with a tenth to spare, beside the decoder's copy of the weights: a picture's cache, and the 12 widths a
    position that prefill holds in a block. Warns where the memory is what decides."""
    check_options(model, total, weights, cache_dtype)
    if most is None:
        c, device = model.config, model.wte.device
        used = (torch.bfloat16 if weights else model.wte.dtype).itemsize
        kept = model.kv_bytes_per_token(stored_dtype(model, weights, cache_dtype).itemsize)
        room = int(0.9 * available_bytes(device)) - model.num_parameters() * used
        fitting = max(1, room // (c.n_ctx * (kept + 12 * c.width * used)))
        most = BATCHES["cuda" if device.type == "cuda" else "cpu"]
        if fitting < min(total, most):
            warnings.warn(f"batch: {fitting} at once, as memory allows, not {min(total, most)}", stacklevel=2)
            most = fitting
    return math.ceil(total / math.ceil(total / most))


def check_memory(model, batch: int, bytes_per_element: int):
    """Raises ValueError if a cache for `batch` pictures doesn't fit, with the bytes and the largest batch that does."""
    each = model.config.n_ctx * model.kv_bytes_per_token(bytes_per_element)
    available = available_bytes(model.wte.device)
    if batch * each > available:
        raise ValueError(
            f"batch: got {batch}, whose cache needs {batch * each:,} bytes of {model.wte.device.type} memory; "
            f"{available:,} are available, which fits a batch of {available // each} at most"
        )

"""Every operation of Image GPT in a few lines of PyTorch: the specification, and the oracle of every test.

Runs on any device in any float dtype, fp64 included, and differentiates by autograd. Half-precision inputs keep
their statistics (means of squares, softmax, log-sum-exp) in fp32, as a careful eager implementation would; all else
happens in the input's dtype. Weights are laid out as in `nn.Linear`: (out, in).

Letters: B batch, N positions, H heads, D head dim, d width, V palette size. Sources: OpenAI's `src/model.py` [code]
and the paper (Chen et al. 2020).
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange

QUICK_GELU = 1.702


def wide(x: torch.Tensor) -> torch.Tensor:
    """fp16 and bf16 go up to fp32; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def attention(q_BNHD, k_BMHD, v_BMHD, causal: bool, scale: float | None = None, kv_len=None):
    """softmax(scale q k^T) v, (B, N, H, D) -> (B, N, H, D). scale defaults to 1/sqrt(D) [code].

    Only the first `kv_len` keys exist (default: all M). Causal queries are the last N of those kv_len positions, so
    N = M is training and N = 1 is one step of decoding."""
    N, M = q_BNHD.shape[1], k_BMHD.shape[1]
    kv_len = M if kv_len is None else kv_len
    scale = q_BNHD.shape[-1] ** -0.5 if scale is None else scale
    scores = wide(einsum(q_BNHD, k_BMHD, "b n h d, b m h d -> b h n m")) * scale
    i = torch.arange(N, device=q_BNHD.device)[:, None]
    j = torch.arange(M, device=q_BNHD.device)[None, :]
    last = kv_len - N + i if causal else kv_len - 1 + 0 * i
    p = scores.masked_fill(j > last, float("-inf")).softmax(-1).to(v_BMHD.dtype)
    return einsum(p, v_BMHD, "b h n m, b m h d -> b n h d")


def norm(x, weight, eps: float = 1e-5, centred: bool = False):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, (..., d) -> (..., d) [code: it does not centre].

    centred=True subtracts the mean first: the layer norm that the paper writes, without a bias."""
    h = wide(x)
    h = h - h.mean(-1, keepdim=True) if centred else h
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * wide(weight)).to(x.dtype)


def quick_gelu(x):
    """x * sigmoid(1.702 x), elementwise [code]."""
    return x * torch.sigmoid(QUICK_GELU * x)


def gelu(x):
    """x P(X <= x) of a standard normal X, elementwise: the exact gelu, by erf (Hendrycks and Gimpel 2016; ViT's)."""
    return F.gelu(x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def norm_linear(x, norm_weight, weight, bias=None, eps: float = 1e-5, centred: bool = False):
    """norm(x) @ weight^T + bias, (..., d) -> (..., out)."""
    return F.linear(norm(x, norm_weight, eps, centred), weight, bias)


def linear_residual(a, weight, residual, bias=None):
    """residual + a @ weight^T + bias, (..., in) -> (..., out)."""
    return residual + F.linear(a, weight, bias)


def norm_mlp(
    x, norm_weight, w_fc, w_proj, b_fc=None, b_proj=None, eps: float = 1e-5, centred: bool = False,
    activation: str = "quick_gelu",
):  # fmt: skip
    """x + activation(norm(x) @ w_fc^T + b_fc) @ w_proj^T + b_proj, (..., d) -> (..., d)."""
    hidden = ACTIVATIONS[activation](norm_linear(x, norm_weight, w_fc, b_fc, eps, centred))
    return linear_residual(hidden, w_proj, x, b_proj)


def quantize_rows(x_MK):
    """Rows in 8 bits, (M, K) -> e4m3 (M, K) and fp32 scales (M, 1), whose product is about x.

    The scale is the least power of two, from 2^-126 on, by which a row fits in e4m3, whose largest number is 448; it is
    NaN where the row is not finite."""
    top = x_MK.float().abs().amax(1, keepdim=True).clamp(min=2.0**-118)
    mantissa, _ = torch.frexp(top)  # top = mantissa * 2^n, mantissa in [0.5, 1); 448 = 0.875 * 2^9
    scale = top / (mantissa * torch.where(mantissa > 0.875, 256, 512))
    return (x_MK.float() / scale).to(torch.float8_e4m3fn), scale


def embed(tokens_BN, wte_Vd, wpe_Nd, sos_d=None, masked_BN=None):
    """Token plus position embedding, (B, N) -> (B, N, d).

    With `sos_d` (AR): position 0 reads sos and position i reads token i-1 [code]; the last token is not read.
    With `masked_BN` (BERT, bool): the token embedding of masked positions is multiplied by 0; the position stays."""
    h = F.embedding(tokens_BN.long(), wte_Vd)  # whose backward, unlike indexing's, adds in one order
    if sos_d is not None:
        h = torch.cat([sos_d.expand(h.shape[0], 1, -1), h[:, :-1]], dim=1)
    if masked_BN is not None:
        h = h * (~masked_BN)[..., None].to(h.dtype)
    return h + wpe_Nd[: tokens_BN.shape[1]]


def head_loss(x, norm_weight, head_weight, targets, eps: float = 1e-5, centred: bool = False):
    """Final norm, output head and cross-entropy: (..., d), (...) -> nats of each position, (...), at least fp32.

    Means, BERT's per-image means and any other token weights are taken outside, on this result."""
    logits = wide(norm_linear(x, norm_weight, head_weight, None, eps, centred))
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets.long()[..., None])[..., 0]


def palette_pixels(pixels):
    """uint8 0..255 -> fp32 in [-1, 1] as pixel/127.5 - 1 [code]; floats are taken to be there already."""
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()


def palette_encode(pixels, palette_V3):
    """Nearest colour in squared distance, the lowest index on ties: (..., 3) -> int64 (...).

    fp32, and in this order, because the answer must be bit-equal everywhere: ((r-r')^2 + (g-g')^2) + (b-b')^2."""
    d_r, d_g, d_b = (palette_pixels(pixels)[..., None, :] - palette_V3.float()).unbind(-1)
    distance = (d_r * d_r + d_g * d_g) + d_b * d_b
    # numpy's argmin is the first minimum by contract; torch's is any.
    return torch.from_numpy(distance.detach().cpu().numpy().argmin(-1)).to(pixels.device)


def palette_decode(tokens, palette_V3):
    """Colours of tokens as uint8: rint(127.5 (c + 1)) clipped to 0..255 [code], (...) -> (..., 3)."""
    return torch.round(127.5 * (palette_V3.float()[tokens.long()] + 1)).clamp(0, 255).to(torch.uint8)


def palette_sums(colours_n3, weight_n, palette_V3):
    """A step of k-means: nearest colours (n,), and each one's sums of weight * (1, r, g, b), all integers, (4, V)."""
    index_n = palette_encode(colours_n3, palette_V3)
    weighted_4n = weight_n * torch.cat([torch.ones_like(colours_n3[:, :1]), colours_n3], 1).T.long()
    return index_n, weight_n.new_zeros(4, len(palette_V3)).index_add_(1, index_n, weighted_4n)


def pack_heads(x_BNd, heads: int):
    """The packed product (B, N, 3 H D) as (B, N, 3, H, D): a view."""
    return rearrange(x_BNd, "b n (three h d) -> b n three h d", three=3, h=heads)

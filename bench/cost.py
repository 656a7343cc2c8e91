"""FLOPs and bytes of every operation, each by one function, and the floor that a machine's two ceilings set.

Letters: B pictures, N positions, H heads, D head dim, d = H D width, V palette, T = B N tokens, e bytes an element.
FLOPs are those of the products (2 a multiply-add), and attention's are counted over the pairs that exist: N (N + 1) / 2
when causal. Backward is two products for each of forward's; attention's recomputes one more. Bytes are compulsory:
every input read once, every output written once, and whatever backward needs written by forward and read again.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do: dense products in FLOP/s, by dtype, and bytes read + written a second."""

    name: str
    flops: dict[str, float]
    bytes: float

    def floor_ms(self, cost: Cost, dtype: str) -> float:
        """No implementation with this cost can be quicker."""
        products = cost.flops / self.flops[dtype] if cost.flops else 0.0
        return 1e3 * max(products, cost.bytes / self.bytes)


# bf16: 8192-cubed product of random data; bytes: device copy, read + written. fp32 means without TF32: data sheet.
H200 = Ceilings("NVIDIA H200", {"bf16": 790e12, "fp16": 790e12, "fp32": 67e12}, 4.3e12)

ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def by_direction(direction: str, forward: Cost, backward: Cost) -> Cost:
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction]


def attention(B, N, H, D, e, causal: bool, direction: str) -> Cost:
    """Two products forward (q k^T, p v), five backward (p again, dv, dp, dq, dk). Saved: q, k, v, o and lse."""
    pairs = B * H * (N * (N + 1) / 2 if causal else N * N)
    tensor, lse = B * N * H * D * e, B * N * H * 4
    return by_direction(direction, Cost(4 * D * pairs, 4 * tensor + lse), Cost(10 * D * pairs, 8 * tensor + lse))


def linear(T, d_in, d_out, e, direction: str) -> Cost:
    """x @ w^T. Backward: dx and dw; reads x, w, dy."""
    flops, x, y, w = 2 * T * d_in * d_out, T * d_in * e, T * d_out * e, d_in * d_out * e
    return by_direction(direction, Cost(flops, x + y + w), Cost(2 * flops, 2 * x + y + 2 * w))


norm_linear = linear  # the normed x never needs memory of its own


def norm(T, d, e, direction: str) -> Cost:
    """Reads x, writes n. Backward reads dn, x, writes dx."""
    return by_direction(direction, Cost(0, 2 * T * d * e), Cost(0, 3 * T * d * e))


def norm_mlp(T, d, inner, e, direction: str) -> Cost:
    """x + act(norm(x) fc) proj: (T, inner) is written once (kept for backward) and read once by the second product,
    since both products in one kernel do not fit a multiprocessor. Backward reads it, and writes and reads its
    gradient; the activation and its gradient are made on chip."""
    flops, weights, wide, slim = 4 * T * d * inner, 2 * d * inner * e, T * inner * e, T * d * e
    forward, backward = 2 * slim + weights + 2 * wide, 3 * slim + 2 * weights + 4 * wide
    return by_direction(direction, Cost(flops, forward), Cost(2 * flops, backward))


def embed(T, d, V, n_ctx, e, direction: str) -> Cost:
    """Tokens (int64) and both tables in, (T, d) out; backward reads (T, d) and writes both tables."""
    cost = Cost(0, (T + V + n_ctx) * d * e + 8 * T)
    return by_direction(direction, cost, cost)


def head_loss(T, d, V, e, direction: str) -> Cost:
    """Norm, product and cross-entropy: x, w and the targets in, a float a token out; the logits stay on chip, and
    backward makes them again or reads their gradient, (T, V), once written."""
    flops, x, w = 2 * T * d * V, T * d * e, V * d * e
    return by_direction(direction, Cost(flops, x + w + 12 * T), Cost(2 * flops, 2 * (x + w + T * V * e)))


def palette(pixels, V) -> Cost:
    """3 bytes and an int64 a pixel, one in and one out; encoding's 8 FLOPs a pixel and colour are none of a matrix
    unit's, so the floor is the bytes'."""
    return Cost(0, pixels * (3 + 8) + V * 12)


def model(config, B, N, e, direction: str) -> Cost:
    """A whole Image GPT: loss of B pictures of N positions; "fwd+bwd" is a training step without its optimiser."""
    c, T = config, B * N
    layer = (
        norm_linear(T, c.width, 3 * c.width, e, direction)
        + attention(B, N, c.heads, c.head_dim, e, c.causal, direction)
        + linear(T, c.width, c.width, e, direction)
        + by_direction(direction, Cost(0, T * c.width * e), Cost(0, 0))  # the residual, read by whoever adds it
        + norm_mlp(T, c.width, c.inner, e, direction)
    )
    ends = embed(T, c.width, c.vocab, N, e, direction) + head_loss(T, c.width, c.vocab, e, direction)
    return c.n_layer * layer + ends


def logits(config, B, N, e) -> Cost:
    """The model's forward to its logits (B, N, V), written once."""
    T = B * N
    return model(config, B, N, e, "fwd") + Cost(0, T * config.vocab * e)


def attention_products(n: int, v: dict) -> float:
    """FLOPs of n products of (pairs of positions, head dim) in one launch of attention, by its arguments' names."""
    head_dim = v["D"] if "D" in v else v["D1"] + v["D2"]
    return 2 * n * head_dim * v["HEADS"] * (v["N"] * (v["N"] + 1) / 2 if v["IS_CAUSAL"] else v["N"] ** 2)


# FLOPs of one launch by its arguments' names, for every kernel: those without a product have none.
FLOPS = {
    "attention_forward_kernel": lambda v: attention_products(2, v),
    "attention_hopper_forward_kernel": lambda v: attention_products(2, v),
    "attention_dq_kernel": lambda v: attention_products(3, v),
    "attention_dkdv_kernel": lambda v: attention_products(4, v),
    "attention_hopper_backward_kernel": lambda v: attention_products(4 if v["OWNS_KEYS"] else 3, v),
    "head_loss_kernel": lambda v: 2 * v["T"] * v["d"] * v["V"],
    "table_backward_kernel": lambda v: 2 * v["R"] * v["V"] * v["d"],
    "linear_kernel": lambda v: 2 * v["B"] * v["O"] * v["K"],
    "attention_kernel": lambda v: 4 * v["k_cache"].numel(),  # of a full cache: how full it is, the device alone knows
} | dict.fromkeys((
    "decode_kernel", "dlogits_kernel", "embed_kernel", "encode_kernel",
    "gelu_backward_kernel", "gelu_kernel", "norm_backward_kernel", "norm_forward_kernel", "position_backward_kernel",
    "sample_kernel", "sum_partials_kernel", "sums_kernel",
), lambda v: 0.0)  # fmt: skip


def moved(values: Iterable) -> float:
    """Bytes of the tensors and descriptors among values: each storage once, and no more of it than they show."""
    shown, held = defaultdict(int), {}
    for t in (getattr(v, "base", v) for v in values):
        if isinstance(t, torch.Tensor):
            storage = t.untyped_storage()
            shown[storage._cdata] += t.numel() * t.element_size()
            held[storage._cdata] = max(storage.nbytes(), 1)
    return float(sum(min(n, held[key]) for key, n in shown.items()))


def launch(kernel: str, values: dict) -> Cost:
    """One launch of ours by its arguments: the products' FLOPs, and each tensor's bytes once. Raises ValueError for a
    kernel that FLOPS doesn't know."""
    if kernel not in FLOPS:
        raise ValueError(f"kernel: got {kernel!r}, expected one of bench.cost.FLOPS: say what it multiplies")
    return Cost(float(FLOPS[kernel](values)), moved(values.values()))

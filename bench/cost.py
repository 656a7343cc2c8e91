"""FLOPs and bytes of every operation, each by the function of its name, and the floor that two measured ceilings set.

A case c has B pictures of N positions, T = B N tokens, H heads of D, width d = H D; e bytes an element.
FLOPs are those of the products (2 a multiply-add), and attention's are counted over the pairs that exist: N (N + 1) / 2
when causal. Backward is two products for each of forward's; attention's recomputes one more. Bytes are compulsory:
every input read once, every output written once, and whatever backward needs written by forward and read again.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __rmul__(self, times: float) -> "Cost":
        return Cost(times * self.flops, times * self.bytes)


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

VOCAB = 512
ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def by_direction(direction: str, forward: Cost, backward: Cost) -> Cost:
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction]


def attention(c, e: int) -> Cost:
    """Two products forward (q k^T, p v), five backward (p again, dv, dp, dq, dk). Saved: q, k, v, o and lse."""
    pairs = c.B * c.H * (c.N * (c.N + 1) / 2 if c.causal else c.N**2)
    tensor, lse = c.T * c.d * e, c.T * c.H * 4
    forward, backward = Cost(4 * c.D * pairs, 4 * tensor + lse), Cost(10 * c.D * pairs, 8 * tensor + lse)
    return by_direction(c.direction, forward, backward)


def linear(c, e: int, d_out: int) -> Cost:
    """x @ w^T. Backward: dx and dw; reads x, w, dy."""
    flops, x, y, w = 2 * c.T * c.d * d_out, c.T * c.d * e, c.T * d_out * e, c.d * d_out * e
    return by_direction(c.direction, Cost(flops, x + y + w), Cost(2 * flops, 2 * x + y + 2 * w))


def norm_linear(c, e: int) -> Cost:
    """The normed x never needs memory of its own."""
    return linear(c, e, 3 * c.d)


def norm(c, e: int) -> Cost:
    """Reads x, writes n. Backward reads dn, x, writes dx."""
    return by_direction(c.direction, Cost(0, 2 * c.T * c.d * e), Cost(0, 3 * c.T * c.d * e))


def norm_mlp(c, e: int) -> Cost:
    """x + act(norm(x) fc) proj: (T, 4 d) is written once (kept for backward) and read once by the second product, since
    both products in one kernel do not fit a multiprocessor. Backward reads it, and writes and reads its gradient; the
    activation and its gradient are made on chip."""
    flops, weights, wide, slim = 16 * c.T * c.d**2, 8 * c.d**2 * e, 4 * c.T * c.d * e, c.T * c.d * e
    forward, backward = 2 * slim + weights + 2 * wide, 3 * slim + 2 * weights + 4 * wide
    return by_direction(c.direction, Cost(flops, forward), Cost(2 * flops, backward))


def gelu(c, e: int) -> Cost:
    """The product with 4 d columns and its elementwise pass: u and h out; backward reads u too."""
    flops, x, w, wide = 8 * c.T * c.d**2, c.T * c.d * e, 4 * c.d**2 * e, 4 * c.T * c.d * e
    return by_direction(c.direction, Cost(flops, x + w + 2 * wide), Cost(flops, x + w + 3 * wide))


def embed(c, e: int) -> Cost:
    """Tokens (int64) and both tables in, (T, d) out; backward reads (T, d) and writes both tables."""
    cost = Cost(0, (c.T + VOCAB + c.N) * c.d * e + 8 * c.T)
    return by_direction(c.direction, cost, cost)


def head_loss(c, e: int) -> Cost:
    """Norm, product and cross-entropy: x, w and the targets in, a float a token out; the logits stay on chip, and
    backward makes them again or reads their gradient, (T, V), once written."""
    flops, x, w = 2 * c.T * c.d * VOCAB, c.T * c.d * e, VOCAB * c.d * e
    return by_direction(c.direction, Cost(flops, x + w + 12 * c.T), Cost(2 * flops, 2 * (x + w + c.T * VOCAB * e)))


def palette_encode(c, e: int) -> Cost:
    """3 bytes and an int64 a pixel, one in and one out; encoding's 8 FLOPs a pixel and colour are none of a matrix
    unit's, so the floor is the bytes'."""
    return Cost(0, c.T * (3 + 8) + VOCAB * 12)


palette_decode = palette_encode


def model(c, e: int) -> Cost:
    """A whole Image GPT: logits, written once ("fwd"), or the loss and its gradients, a step without its optimiser."""
    c = replace(c, direction="fwd" if c.direction == "fwd" else "fwd+bwd")
    residual = Cost(0, c.T * c.d * e)  # read by whoever adds it
    layer = norm_linear(c, e) + attention(c, e) + linear(c, e, c.d) + residual + norm_mlp(c, e)
    total = c.layers * layer + embed(c, e) + head_loss(c, e)
    return total + Cost(0, c.T * VOCAB * e) if c.direction == "fwd" else total


def decode(c, e: int) -> Cost:
    """A token's compulsory bytes and FLOPs: every weight of a product once, the keys and values so far once, on average
    over the window."""
    weights, head, keys = c.layers * 12 * c.d**2, VOCAB * c.d, c.N - (c.steps - 1) / 2
    kv, stored = 2 * c.layers * c.B * keys * c.d, 1 if c.dtype == "int8" else e
    return Cost(2 * c.B * (weights + head) + 2 * kv, weights * stored + head * e + kv * c.cached)


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
    "gelu_hopper_kernel": lambda v: 2 * v["a_desc"].base.numel() * v["N"],
    "head_loss_kernel": lambda v: 2 * v["T"] * v["d"] * v["V"],
    "table_backward_kernel": lambda v: 2 * v["R"] * v["V"] * v["d"],
    "linear_kernel": lambda v: 2 * v["B"] * v["O"] * v["K"],
    "attention_kernel": lambda v: 4 * v["k_cache"].numel(),  # of a full cache: how full it is, the device alone knows
} | dict.fromkeys((
    "decode_kernel", "dlogits_kernel", "embed_kernel", "encode_kernel",
    "gelu_backward_kernel", "gelu_kernel", "norm_backward_kernel", "norm_forward_kernel", "position_backward_kernel",
    "quantize_rows_kernel", "sample_kernel", "sum_partials_kernel", "sums_kernel",
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

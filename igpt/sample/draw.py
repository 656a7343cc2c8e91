"""Drawing one token from logits: counter-based noise, top-k, top-p, temperature.

    token = argmax_k(logits_k / temperature + g_k),  g_k = -log(-log(u_k)),  u_k uniform in [0, 1)

u_k depends on (seed, picture, position, k) only: Philox-4x32-10 with key `seed` and counter
(picture << 32) + position * V + k, the float that Triton's `tl.rand(seed, counter)` gives, so that kernels and this
file draw alike. So a seed gives the same pictures whatever the batch they are drawn in. Gumbel's argmax also keeps
them the same when logits differ in their last bits: a draw changes with probability about the size of the difference,
where the inverse of the cumulative sum would change V / 2 times as often.
"""

import math
from dataclasses import dataclass, replace
from numbers import Integral

import torch

from igpt.kernels import checks

MASK = 0xFFFFFFFF
CHUNK = 1 << 16  # elements of noise drawn at once: on a CPU their 64-bit temporaries stay in its cache


def philox(seed: int, counter: torch.Tensor) -> torch.Tensor:
    """The first word of Philox-4x32-10 (Salmon et al. 2011) as int64 in [0, 2^32); key and counter are 64 bits."""
    c0, c1 = counter & MASK, (counter >> 32) & MASK
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=counter.device)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # int64 products wrap modulo 2^64: all 64 bits of the unsigned product are there.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK, ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def uniform(seed: int, counter: torch.Tensor) -> torch.Tensor:
    """fp32 in [0, 1), bit for bit `tl.rand(seed, counter)`."""
    word = philox(seed, counter).to(torch.int32)
    return torch.where(word < 0, -word - 1, word) * 4.6566127342e-10


def gumbel(seed: int, pictures: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The noise of pictures (B,) int64 at positions (P,) int64: fp32 (P, B, V)."""
    row = (pictures[None, :] << 32) + positions[:, None] * vocab
    counter = row[:, :, None] + torch.arange(vocab, device=row.device)
    return uniform(seed, counter).log_().neg_().log_().neg_()


def truncate(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """-inf for tokens that may not be drawn; equal logits live or die together.

    top_k: fewer than top_k tokens are likelier. top_p: the likelier tokens have less than top_p of the mass that
    top_k left."""
    if top_k is None and top_p is None:
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    if top_k is not None:
        ordered = ordered.masked_fill(ordered < ordered[..., top_k - 1 : top_k], -math.inf)
    if top_p is not None:
        p = ordered.softmax(-1)
        dead = p.cumsum(-1) - p >= top_p
        dead[..., 0] = False  # 0 is not below a top_p that fp32 doesn't hold
        ordered = ordered.masked_fill(dead, -math.inf)
    floor = ordered.masked_fill(ordered == -math.inf, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < floor, -math.inf)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn: temperature (0: the likeliest, the lowest on ties), top_k and top_p (None: all), and the
    noise: picture i of a batch draws with the counters of (seed, first + i)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    first: int = 0

    def check(self, vocab: int) -> "Sampler":
        """Itself with a temperature that can be divided by, or ValueError for a value that draws nothing from `vocab`
        tokens."""
        if self.top_k is not None and not (isinstance(self.top_k, Integral) and 1 <= self.top_k <= vocab):
            raise ValueError(f"top_k: got {self.top_k}, expected None or 1 to the palette's {vocab}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, expected None or a number in (0, 1]")
        if not (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed: got {self.seed}, expected an integer of 64 bits")
        return replace(self, temperature=checks.temperature("sample", self.temperature))

    def noise(self, batch: int, vocab: int, start: int, stop: int, device):
        """The noise (B, V) of each position, drawn a chunk of positions at a time; None for each when greedy."""
        pictures = torch.arange(self.first, self.first + batch, device=device)
        chunk = max(1, CHUNK // (batch * vocab)) if self.temperature else stop - start
        for i in range(start, stop, chunk):
            positions = torch.arange(i, min(i + chunk, stop), device=device)
            drawn = gumbel(self.seed, pictures, positions, vocab) if self.temperature else [None] * len(positions)
            yield from drawn

    def __call__(self, logits_BV, noise_BV):
        """One token of each row, int64 (B,)."""
        if not self.temperature:
            return logits_BV.argmax(-1)
        scores = truncate(logits_BV.float() / self.temperature, self.top_k, self.top_p)
        return (scores + noise_BV).argmax(-1)

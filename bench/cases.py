"""One case table: what is checked, timed and compiled is the same operations on the same inputs.

An operation here is how to make its inputs, how to run it (ours and the reference) and its cost. Inputs come from
real pictures: emoji as tokens of a colour cube, embedded and projected by random tables.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from bench import cost
from igpt import ImageGPT, data, ops
from igpt.config import PRESETS
from igpt.kernels import reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCAB = 512


def palette_cube() -> torch.Tensor:
    """512 colours that need no fit: 8 levels a channel, (512, 3) in [-1, 1]."""
    level = torch.linspace(-1, 1, 8)
    return torch.cartesian_prod(level, level, level)


@functools.cache
def pixels() -> torch.Tensor:
    """The pixels of the built-in pictures in raster order, uint8 (n, 3)."""
    return torch.from_numpy(np.ascontiguousarray(data.load("builtin:emoji", "train+valid").images)).view(-1, 3)


@functools.cache
def stream() -> torch.Tensor:
    """The same as tokens of the cube: int64 (n,)."""
    level = torch.div(pixels().int() * 7 + 127, 255, rounding_mode="floor").clamp(max=7)
    return (level * torch.tensor([64, 8, 1])).sum(-1)


def tokens(B: int, N: int, device="cpu") -> torch.Tensor:
    """B sequences of N tokens of real pictures, from a third of the way in (emoji there fill their squares)."""
    start, all_of_them = len(stream()) // 3, stream()
    index = (start + torch.arange(B * N)) % len(all_of_them)
    return all_of_them[index].view(B, N).to(device)


class Timed:
    """What a case tells of its row: what must be right in which dtype before it has a speed (`needs`), how many `unit`s
    are done in the row's milliseconds (ratios compare rates), and what part of a call those are (`share`)."""

    unit, rate, share = "", 1.0, 1.0
    is_whole = False  # a model: its memory is measured too, and its batch halved until that fits

    @property
    def needs(self) -> list[tuple[str, str]]:
        return [(self.op, self.dtype)]

    def useful(self) -> float | None:
        """FLOPs that a model-FLOPs utilisation counts."""


@dataclass(frozen=True)
class Case(Timed):
    """One operation at one size: d = H D; the MLP's inner width is 4 d; V = 512. Or the whole "model" of a preset: its
    logits ("fwd"), loss and gradients, or these and the optimiser ("step"). Or a token of its "decode", on average over
    positions N - steps .. N - 1: dtype is then the weights', `cached` are the bytes of the cache's elements."""

    op: str
    B: int
    N: int
    H: int
    D: int
    dtype: str = "bf16"
    causal: bool = True
    direction: str = "fwd"
    preset: str = ""
    steps: int = 0
    cached: int = 0

    @property
    def d(self) -> int:
        return self.H * self.D

    @property
    def labels(self) -> dict:
        """The fields that a Row takes from its case."""
        names = ("op", "B", "N", "H", "D", "d", "dtype", "causal", "direction", "preset")
        return {n: getattr(self, n) for n in names}

    @property
    def start(self) -> int:
        return self.N - self.steps

    @property
    def activations(self) -> str:
        return "bf16" if self.dtype == "int8" else self.dtype

    @property
    def model(self) -> "Case":
        """What decodes."""
        n_ctx = PRESETS[self.preset].n_ctx
        return replace(self, op="model", N=n_ctx, dtype=self.activations, direction="fwd", steps=0, cached=0)

    @property
    def is_whole(self) -> bool:
        return self.op == "model"

    @property
    def needs(self) -> list[tuple[str, str]]:
        parts = ("model", "attention", *ROW_OPS) if self.is_whole else (self.op,)
        return [(part, self.activations) for part in parts]

    @property
    def rate(self) -> float:
        if self.steps:
            return self.B / PRESETS[self.preset].n_ctx
        return self.B * self.N if self.is_whole else 1.0

    @property
    def unit(self) -> str:
        """The start of a picture says nothing about a whole one."""
        if self.steps:
            return "pictures" if self.steps < self.N or self.steps == PRESETS[self.preset].n_ctx else ""
        return "tokens" if self.is_whole else ""

    @property
    def share(self) -> float:
        return 1 / self.steps if self.steps else 1.0

    def useful(self) -> float | None:
        """Of a model its own FLOPs, recomputation left out."""
        if self.is_whole:
            model = ImageGPT(replace(PRESETS[self.preset], n_ctx=self.N), device="meta")
            return model.flops_per_token(training=self.direction != "fwd") * self.rate

    def cost(self) -> cost.Cost:
        e = cost.ELEMENT[self.activations]
        return WHOLE[self.op](self, PRESETS[self.preset], e) if self.op in WHOLE else OPS[self.op].cost(self, e)

    def inputs(self, device="cpu") -> dict[str, torch.Tensor]:
        """Tensors by name; on "meta", their shapes alone."""
        return OPS[self.op].inputs(self, Draw(self, device))

    def ours(self, impl: str = "auto") -> Callable:
        if self.op == "attention":
            return lambda qkv: ops.attention(qkv, causal=self.causal, impl=impl)
        return functools.partial(getattr(ops, self.op), impl=impl)

    def reference(self) -> Callable:
        if self.op == "attention":
            return lambda qkv: reference.attention(*qkv.unbind(2), self.causal)
        spec = getattr(reference, self.op)
        return lambda **inputs: spec(*inputs.values())

    @property
    def diff(self) -> tuple[str, ...]:
        """The inputs with a gradient."""
        return OPS[self.op].diff

    def answers(self, impl: str, inputs: dict) -> list[torch.Tensor]:
        """The output and every gradient of one call."""
        args = {k: v.detach().requires_grad_(k in self.diff) for k, v in inputs.items()}
        out = self.ours(impl)(**args)
        return [out.detach(), *torch.autograd.grad(out, [args[k] for k in self.diff], torch.ones_like(out))]


class Draw:
    """Random tables and embedded pictures of one case, in its dtype on its device."""

    def __init__(self, case: Case, device):
        self.case, self.device, self.dtype = case, torch.device(device), DTYPES[case.dtype]
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * std + mean).to(self.dtype)

    def tokens(self) -> torch.Tensor:
        return tokens(self.case.B, self.case.N, self.device)

    def pixels(self) -> torch.Tensor:
        return pixels()[torch.arange(self.case.B * self.case.N) % len(pixels())].to(self.device)

    def palette(self) -> torch.Tensor:
        return palette_cube().to(self.device)

    def stream(self) -> torch.Tensor:
        """A residual stream (B, N, d): pictures embedded, plus noise for what attention would have added."""
        c = self.case
        return self.normal(VOCAB, c.d)[self.tokens()] + self.normal(c.B, c.N, c.d, std=0.5)

    def gain(self) -> torch.Tensor:
        return self.normal(self.case.d, std=0.1, mean=1.0)

    def weight(self, d_out: int, d_in: int) -> torch.Tensor:
        return self.normal(d_out, d_in, std=d_in**-0.5)

    def qkv(self) -> torch.Tensor:
        c = self.case
        return F.linear(self.stream(), self.weight(3 * c.d, c.d)).view(c.B, c.N, 3, c.H, c.D)


@dataclass(frozen=True)
class Op:
    """Its inputs, named and ordered as the functions of its name in igpt.ops and reference take them; its cost; and the
    inputs with a gradient."""

    inputs: Callable[[Case, Draw], dict]
    cost: Callable[[Case, int], cost.Cost]
    diff: tuple[str, ...] = ()


OPS = {
    "attention": Op(
        lambda c, draw: {"qkv": draw.qkv()},
        lambda c, e: cost.attention(c.B, c.N, c.H, c.D, e, c.causal, c.direction),
        diff=("qkv",),
    ),
    "norm": Op(
        lambda c, draw: {"x": draw.stream(), "weight": draw.gain()},
        lambda c, e: cost.norm(c.B * c.N, c.d, e, c.direction),
        diff=("x", "weight"),
    ),
    "norm_linear": Op(
        lambda c, draw: {"x": draw.stream(), "norm_weight": draw.gain(), "weight": draw.weight(3 * c.d, c.d)},
        lambda c, e: cost.norm_linear(c.B * c.N, c.d, 3 * c.d, e, c.direction),
        diff=("x", "norm_weight", "weight"),
    ),
    "norm_mlp": Op(
        lambda c, draw: {
            "x": draw.stream(), "norm_weight": draw.gain(),
            "w_fc": draw.weight(4 * c.d, c.d), "w_proj": draw.weight(c.d, 4 * c.d),
        },
        lambda c, e: cost.norm_mlp(c.B * c.N, c.d, 4 * c.d, e, c.direction),
        diff=("x", "norm_weight", "w_fc", "w_proj"),
    ),
    "head_loss": Op(
        lambda c, draw: {
            "x": draw.stream(), "norm_weight": draw.gain(),
            "head_weight": draw.weight(VOCAB, c.d), "targets": draw.tokens(),
        },
        lambda c, e: cost.head_loss(c.B * c.N, c.d, VOCAB, e, c.direction),
        diff=("x", "norm_weight", "head_weight"),
    ),
    "embed": Op(
        lambda c, draw: {
            "tokens": draw.tokens(), "wte": draw.normal(VOCAB, c.d), "wpe": draw.normal(c.N, c.d), "sos": draw.gain(),
        },
        lambda c, e: cost.embed(c.B * c.N, c.d, VOCAB, c.N, e, c.direction),
        diff=("wte", "wpe", "sos"),
    ),
    "palette_encode": Op(
        lambda c, draw: {"pixels": draw.pixels(), "palette": draw.palette()},
        lambda c, e: cost.palette(c.B * c.N, VOCAB),
    ),
    "palette_decode": Op(
        lambda c, draw: {"tokens": draw.tokens(), "palette": draw.palette()},
        lambda c, e: cost.palette(c.B * c.N, VOCAB),
    ),
}  # fmt: skip

def model_cost(c: Case, config, e: int) -> cost.Cost:
    return cost.logits(config, c.B, c.N, e) if c.direction == "fwd" else cost.model(config, c.B, c.N, e, "fwd+bwd")


def decode_cost(c: Case, config, e: int) -> cost.Cost:
    """One step's compulsory bytes and FLOPs: every weight of a product once, the keys and values so far once, on
    average over the window."""
    weights = config.n_layer * (4 * c.d**2 + 2 * c.d * config.inner)
    head, keys = config.vocab * c.d, c.N - (c.steps - 1) / 2
    kv, stored = 2 * config.n_layer * c.B * keys * c.d, 1 if c.dtype == "int8" else e
    return cost.Cost(2 * c.B * (weights + head) + 2 * kv, weights * stored + head * e + kv * c.cached)


WHOLE = {"model": model_cost, "decode": decode_cost}
ROW_OPS = ("norm_mlp", "norm_linear", "head_loss", "norm", "embed")
PIXEL_OPS = ("palette_encode", "palette_decode")
PIXELS = [Case(op, 4096, 1024, 1, 64, "fp32") for op in PIXEL_OPS]


def correctness(quick: bool, gpu: bool) -> list[Case]:
    """Small enough for the interpreter, odd where that can break something; on a GPU at the lengths that count.

    Every head dim that is fast, causal and full, and every operation, in bf16, fp16 and fp32."""
    dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32")
    lengths = ((2, 1024), (1, 2304)) if gpu else ((1, 77),) if quick else ((1, 128), (1, 77))
    found = []
    for dtype in dtypes:
        for B, N in lengths:
            for D in (64, 96, 128):
                found += [Case("attention", B, N, 2, D, dtype, causal, "fwd+bwd") for causal in (True, False)]
        B, N = (4, 1024) if gpu else (2, 50)
        for H, D in ((8, 64), (8, 128), (16, 96)) if gpu else ((1, 64), (1, 96)):
            found += [Case(op, B, N, H, D, dtype, direction="fwd+bwd") for op in ROW_OPS]
        if dtype == "bf16":  # first what speeds are shown of, should the time not do for all
            found += [Case(op, 2, 1024, 1, 64, "fp32") for op in PIXEL_OPS]
    return found


def shapes(preset: str) -> tuple[int, int]:
    return PRESETS[preset].heads, PRESETS[preset].head_dim


def model_case(preset: str, B: int, N: int, dtype: str, direction: str) -> Case:
    return Case("model", B, N, *shapes(preset), dtype, PRESETS[preset].causal, direction, preset)


def decode_case(preset: str, B: int, N: int, dtype: str, steps: int = 64, cached: int = 2) -> Case:
    """A GPU's cache has the activations' dtype, a CPU's is fp32."""
    return Case("decode", B, N, *shapes(preset), dtype, True, "token", preset, steps, cached)


def sized(
    op: str, presets: Iterable[str], directions: Iterable[str], T: int, N: int = 1024, dtype="bf16", causal: bool = True
) -> list[Case]:
    """One operation at the presets' shapes, T tokens a call in pictures of N."""
    return [
        Case(op, max(1, T // N), N, *shapes(preset), dtype, causal, direction, preset)
        for direction in directions for preset in presets
    ]  # fmt: skip


def speed(presets, lengths, dtypes, directions, T: int) -> list[Case]:
    """Every operation at the presets' shapes, T tokens a call; attention at every length, and full at the first."""
    found = []
    for dtype in dtypes:
        for N in lengths:
            found += sized("attention", presets, directions, T, N, dtype)
        for op in ROW_OPS:
            found += sized(op, presets, directions, T, lengths[0], dtype)
        found += sized("attention", presets, directions, T, lengths[0], dtype, causal=False)
    return found

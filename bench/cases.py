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
from bench.cost import VOCAB
from igpt import ImageGPT, ViT, data, ops
from igpt.config import PRESETS, VITS, Config, ViTConfig
from igpt.kernels import reference

ROW_OPS = ("norm_mlp", "norm_linear", "head_loss", "norm", "embed")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def palette_cube() -> torch.Tensor:
    """512 colours that need no fit: 8 levels a channel, (512, 3) in [-1, 1]."""
    level = torch.linspace(-1, 1, 8)
    return torch.cartesian_prod(level, level, level)


def pictures(count: int) -> np.ndarray:
    """The built-in pictures, uint8 (count, 32, 32, 3), repeated as needed."""
    images = data.load("builtin:emoji", "train+valid").images
    return images[np.arange(count) % len(images)]


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


# Whole models, with the operations that must be right before one has a speed.
WHOLE = {"model": ("model", "attention", *ROW_OPS), "vit": ("attention", "ragged attention", *ROW_OPS[:2], "norm")}

WHOLE_PICTURES = ("vit", "decode", "palette pictures", "palette fit", "encode folder")


@dataclass(frozen=True)
class Case:
    """One operation at one size: d = H D; the MLP's inner width is 4 d; V = 512. Or the whole "model" or "vit" of a
    preset: its logits ("fwd"), loss and gradients, or these and the optimiser ("step"). Or a token of its "decode", on
    average over the `steps` of a call, positions N - steps .. N - 1: dtype is then the weights', `cached` are the bytes
    of the cache's elements. Or what speed/pictures.py does with B pictures of N pixels."""

    op: str
    B: int
    N: int
    H: int
    D: int
    dtype: str = "bf16"
    causal: bool = True
    direction: str = "fwd"
    preset: str = ""
    steps: int = 1
    cached: int = 0

    @property
    def d(self) -> int:
        return self.H * self.D

    @property
    def T(self) -> int:
        return self.B * self.N

    @property
    def config(self) -> Config | ViTConfig:
        return (PRESETS | VITS)[self.preset]

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
        dtype = self.activations
        return replace(self, op="model", N=self.config.n_ctx, dtype=dtype, direction="fwd", steps=1, cached=0)

    @property
    def is_whole(self) -> bool:
        """A model: its memory is measured too, and its batch halved until that fits."""
        return self.op in WHOLE

    @property
    def needs(self) -> list[tuple[str, str]]:
        """What must be right, and in which dtype, before this has a speed."""
        return [(part, self.activations) for part in WHOLE.get(self.op, (self.op,))]

    @property
    def unit(self) -> str:
        """What a call does several of. The start of a picture says nothing about a whole one."""
        if self.op not in WHOLE_PICTURES or self.steps == self.N < self.config.n_ctx:
            return "tokens" if self.op == "model" else ""
        return "pictures"

    @property
    def rate(self) -> float:
        """How many of them, which is what ratios compare."""
        if self.op == "decode":
            return self.B / self.config.n_ctx
        return {"tokens": self.T, "pictures": self.B}.get(self.unit, 1.0)

    def useful(self) -> float | None:
        """FLOPs that a model-FLOPs utilisation counts: a model's own, recomputation left out."""
        training = self.direction != "fwd"
        if self.op == "vit":
            return self.B * ViT(self.config, device="meta").flops_per_picture(training=training)
        if self.op == "model":
            model = ImageGPT(replace(self.config, n_ctx=self.N), device="meta")
            return model.flops_per_token(training=training) * self.T

    def cost(self) -> cost.Cost:
        return getattr(cost, self.op.replace(" ", "_"))(self, cost.ELEMENT[self.activations])

    def inputs(self, device="cpu") -> dict[str, torch.Tensor]:
        """Tensors by name; on "meta", their shapes alone."""
        return OPS[self.op](self, Draw(self, device))

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
        return gradients(self.op)

    def answers(self, impl: str, inputs: dict) -> list[torch.Tensor]:
        """The output and every gradient of one call, if there are any."""
        args = {k: v.detach().requires_grad_(k in self.diff) for k, v in inputs.items()}
        out, leaves = self.ours(impl)(**args), [args[k] for k in self.diff]
        return [out.detach(), *(torch.autograd.grad(out, leaves, torch.ones_like(out)) if leaves else ())]


class Draw:
    """Random tables and embedded pictures of one case, in its dtype on its device."""

    def __init__(self, case: Case, device):
        self.case, self.device, self.dtype = case, torch.device(device), DTYPES[case.dtype]
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)

    def normal(self, *shape, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator, device=self.device) * std + mean).to(self.dtype)

    def tokens(self) -> torch.Tensor:
        return tokens(self.case.B, self.case.N, self.device)

    def stream(self) -> torch.Tensor:
        """A residual stream (B, N, d): pictures embedded, plus noise for what attention would have added."""
        c = self.case
        return self.normal(VOCAB, c.d)[self.tokens()] + self.normal(c.B, c.N, c.d, std=0.5)

    def gain(self) -> torch.Tensor:
        return self.normal(self.case.d, std=0.1, mean=1.0)

    def weight(self, d_out: int, d_in: int) -> torch.Tensor:
        return self.normal(d_out, d_in, std=d_in**-0.5)


# Each operation's inputs, named and ordered as the functions of its name in igpt.ops and reference take them.
OPS: dict[str, Callable[[Case, Draw], dict]] = {
    "attention": lambda c, draw: {
        "qkv": F.linear(draw.stream(), draw.weight(3 * c.d, c.d)).view(c.B, c.N, 3, c.H, c.D),
    },
    "norm": lambda c, draw: {"x": draw.stream(), "weight": draw.gain()},
    "norm_linear": lambda c, draw: {
        "x": draw.stream(), "norm_weight": draw.gain(), "weight": draw.weight(3 * c.d, c.d),
    },
    "norm_mlp": lambda c, draw: {
        "x": draw.stream(), "norm_weight": draw.gain(),
        "w_fc": draw.weight(4 * c.d, c.d), "w_proj": draw.weight(c.d, 4 * c.d),
    },
    "head_loss": lambda c, draw: {
        "x": draw.stream(), "norm_weight": draw.gain(),
        "head_weight": draw.weight(VOCAB, c.d), "targets": draw.tokens(),
    },
    "embed": lambda c, draw: {
        "tokens": draw.tokens(), "wte": draw.normal(VOCAB, c.d), "wpe": draw.normal(c.N, c.d), "sos": draw.gain(),
    },
    "palette_encode": lambda c, draw: {
        "pixels": pixels()[torch.arange(c.T) % len(pixels())].to(draw.device),
        "palette": palette_cube().to(draw.device),
    },
    "palette_decode": lambda c, draw: {"tokens": draw.tokens(), "palette": palette_cube().to(draw.device)},
}  # fmt: skip


@functools.cache
def gradients(op: str) -> tuple[str, ...]:
    """The inputs with a gradient: every float one but a palette."""
    inputs = Case(op, 1, 16, 1, 16).inputs("meta")
    return tuple(name for name, t in inputs.items() if t.is_floating_point() and name != "palette")


PIXEL_OPS = ("palette_encode", "palette_decode")
RAGGED = [Case("attention", 2, 1000, 2, D, "bf16", c, "fwd+bwd") for D in (64, 96, 128) for c in (True, False)]
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


def vit_cases(device: str, dtypes: Iterable[str]) -> list[Case]:
    """A batch of B and a step of it on a GPU; on a CPU a picture of B, and a step of tiny."""
    sizes = [("vit-b16", 128, "fwd"), ("vit-b16", 128, "step")]
    if device == "cpu":
        sizes = [("vit-b16", 1, "fwd"), ("vit-tiny", 64, "step")]
    return [
        Case("vit", B, 1 + c.side**2, c.heads, c.head_dim, dtype, False, direction, name)
        for name, B, direction in sizes for c in (VITS[name],) for dtype in dtypes
    ]  # fmt: skip


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

"""What the compile suite launches: every operation of bench/cases.py, forward and backward, on meta tensors.

Shapes matter to a binary only by their head dim and by what 16 divides, so a few stand for all: the presets' widths at
1024 positions, and lengths that nothing divides.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.cases import PIXEL_OPS, ROW_OPS, Case, shapes
from bench.speed import products
from igpt import ImageGPT
from igpt.kernels import tiles
from igpt.kernels.device import ARCHS
from igpt.kernels.palette import palette_sums
from igpt.kernels.quantize import quantize_rows
from igpt.sample.draw import Sampler
from igpt.sample.kernel_decoder import KernelDecoder


@dataclass(frozen=True)
class CompileCase:
    """`run()` calls launchers. `quick`: in the quick suite."""

    name: str
    run: Callable[[], None]
    quick: bool = False
    archs: tuple[str, ...] = ARCHS


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_and_backward(case: Case) -> None:
    inputs = case.inputs("meta")
    for name in case.diff:
        inputs[name].requires_grad_()
    out = case.ours("triton")(**inputs)
    if case.diff:
        out.backward(torch.empty_like(out))


def decode_step(
    preset: str, B: int, dtype=torch.bfloat16, weights: str | None = None, cache: str = "bf16",
    sampler: Sampler | None = None, **config,
) -> None:  # fmt: skip
    """One token of B pictures by the decoding kernels; every layer launches the same, so one stands for all."""
    with torch.no_grad():
        model = ImageGPT.from_preset(preset, impl="triton", device="meta", dtype=dtype, n_layer=1, **config)
        KernelDecoder(model, B, weights=weights, cache_dtype=cache).draw(sampler or Sampler())


def of(case: Case, name: str, quick: bool = False, archs: tuple[str, ...] = ARCHS) -> CompileCase:
    return CompileCase(f"{case.op} {name}", functools.partial(forward_and_backward, case), quick, archs)


def cases() -> Iterator[CompileCase]:
    """bf16 at every preset everywhere. fp32, fp16 and ragged lengths, whose tiles are shared between architectures,
    only where they are run most: sm_90, and (but fp16, which compiles as bf16 does) the portable tiles."""
    few = ("portable", "sm_90")
    for preset in ("s", "m", "l"):
        H, D = shapes(preset)
        for dtype, archs in (("bf16", ARCHS), ("fp32", few), ("fp16", ("sm_90",))):
            if dtype == "fp16" and preset != "s":
                continue
            quick, ragged = dtype == "bf16", dtype != "fp16"
            for causal in (True, False):
                name = f"D{D} {dtype}{'' if causal else ' full'}"
                yield of(Case("attention", 32, 1024, H, D, dtype, causal), name, quick and causal, archs)
                if ragged:
                    yield of(Case("attention", 32, 1001, H, D, dtype, causal), f"{name} N1001", archs=few)
            for op in ROW_OPS:
                yield of(Case(op, 32, 1024, H, D, dtype), f"d{H * D} {dtype}", quick and preset == "s", archs)
                if ragged:
                    yield of(Case(op, 1, 77, H, D, dtype), f"d{H * D} {dtype} T77", archs=few)
    has_fp8 = "portable", "sm_90", "sm_100"  # sm_80 has none; gfx942 has another format and converts in software
    for preset, batches, name, archs, options in (
        ("s", (1, 4, 128), "", ARCHS, {}),
        ("m", (1,), "", ARCHS, {}),
        ("l", (1, 128), "", ARCHS, {}),
        ("m", (128,), "", ("sm_90",), {}),
        ("xl", (4,), "", ("sm_90",), {}),
        ("m", (4, 16), "fp32", few, {"dtype": torch.float32, "cache": "fp32"}),
        ("s", (4,), "int8", ARCHS, {"weights": "int8"}),
        ("l", (4,), "int8", ("sm_90",), {"weights": "int8"}),
        ("s", (4, 128), "fp8 cache", has_fp8, {"cache": "fp8"}),
        ("s", (4, 128), "layer norm, biases", few, {"norm": "layer", "bias": True}),
        ("s", (4,), "top_k top_p", few, {"sampler": Sampler(top_k=64, top_p=0.9)}),
    ):
        for B in batches:
            run = functools.partial(decode_step, preset, B, **options)
            yield CompileCase(f"decode {preset} B{B} {name}".strip(), run, preset == "s" and not options, archs)
    for tile, direction, alone in itertools.product(tiles.GELU_HOPPER, ("fwd", "bwd"), (False, True)):
        given = products.operands(Case("gelu", 32, 1024, *shapes("s"), direction=direction), "meta")
        run = functools.partial(products.candidate, tile, *given, alone)
        name = f"gelu {direction}{' alone' if alone else ''} steps of {tile.BLOCK_K}"
        yield CompileCase(name, run, archs=("sm_90",))
    for name, x in (
        ("rows", meta(32768, 2048)), ("rows T77", meta(77, 512)), ("columns", meta(2048, 512).t()),
    ):  # fmt: skip
        yield CompileCase(f"quantize {name}", functools.partial(quantize_rows, x), archs=has_fp8)
    for op in PIXEL_OPS:
        yield of(Case(op, 32, 1024, 1, 64, "fp32"), "V512", True)
    colours, weight = meta(1 << 20, 3, dtype=torch.uint8), meta(1 << 20, dtype=torch.int64)
    step = functools.partial(palette_sums, colours, weight, meta(512, 3, dtype=torch.float32))
    yield CompileCase("palette_sums V512", step, True)

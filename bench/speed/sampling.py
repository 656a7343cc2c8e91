"""What a token costs when pictures are sampled: `python -m bench.speed.sampling --device cpu`.

Ours against Hugging Face's generate (dynamic cache) and a compiled static-cache loop, on the same weights' shapes, over
the same window of positions; each variant draws every token. N is where the window ends: 64 is the start of a picture,
544 its middle, whose cost is the average token's; 1024 with as many steps is whole pictures. Before anything is timed,
decoding is checked against the full forward.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.cases import DTYPES, tokens
from bench.compiled.compile import capture
from bench.compiled.step import Vendor
from bench.correctness.budget import compare
from bench.cost import Cost
from bench.machine import attempted, stamp
from bench.rows import Row, to_json
from bench.speed import models, peers
from bench.speed.measure import Run, Variant, blank, rows_of, subject, timers, warmed
from bench.speed.models import ModelCase
from bench.speed.peers import Absent
from igpt import ImageGPT, data, sample
from igpt.config import PRESETS, preset
from igpt.kernels import reference
from igpt.sample import decoder_of
from igpt.sample.draw import Sampler

STORED = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a weight
STEPS = 64


@dataclass(frozen=True)
class DecodeCase:
    """B pictures of a preset, positions N - steps .. N - 1. dtype: of the weights."""

    preset: str
    B: int
    N: int
    dtype: str
    steps: int = STEPS

    @property
    def start(self) -> int:
        return self.N - self.steps

    @property
    def whole(self) -> bool:
        return self.steps == PRESETS[self.preset].n_ctx

    @property
    def labels(self) -> dict:
        c = PRESETS[self.preset]
        return {
            "op": "decode", "preset": self.preset, "B": self.B, "N": self.N, "H": c.heads, "D": c.head_dim,
            "d": c.width, "dtype": self.dtype, "direction": "token",
        }  # fmt: skip

    @property
    def activations(self) -> str:
        return "bf16" if self.dtype == "int8" else self.dtype

    def cost(self, cached: int) -> Cost:
        """One step's compulsory bytes and FLOPs: every weight of a product once, the keys and values so far once
        (`cached` bytes an element), on average over the window."""
        c, keys = PRESETS[self.preset], (self.start + self.N + 1) / 2
        weights = c.n_layer * (4 * c.width**2 + 2 * c.width * c.inner)
        head = c.vocab * c.width
        kv = 2 * c.n_layer * self.B * keys * c.width
        flops = 2 * self.B * (weights + head) + 2 * kv
        return Cost(flops, weights * STORED[self.dtype] + head * STORED[self.activations] + kv * cached)


def ours(case: DecodeCase, device: str) -> Callable[[], object]:
    model = models.ours(ModelCase(case.preset, case.B, PRESETS[case.preset].n_ctx, case.activations, "fwd"), device)
    decoder = decoder_of(model, case.B, weights=None if case.dtype == case.activations else case.dtype)
    drawn = tokens(case.B, model.config.n_ctx, device).clone()
    if case.start:
        decoder.prefill(drawn[:, : case.start])
    return lambda: decoder.sample(drawn, case.start, case.N, Sampler())


def hugging_face(case: DecodeCase, device: str):
    """generate() of transformers' ImageGPT, sampling; the cache up to the window is there already."""
    n_ctx = PRESETS[case.preset].n_ctx
    model = models.hugging_face(ModelCase(case.preset, case.B, n_ctx, case.activations, "fwd"), device)
    if isinstance(model, Absent):
        return model
    model.eval()
    sos = torch.full((case.B, 1), model.config.vocab_size - 1, device=device)
    prompt = torch.cat([sos, tokens(case.B, case.start, device)], 1) if case.start else sos
    cache = None
    if case.start:
        with torch.no_grad():
            cache = model(prompt[:, :-1], use_cache=True).past_key_values

    def run():
        if cache is not None and (drawn := cache.get_seq_length() - case.start):
            cache.crop(-drawn)
        return model.generate(prompt, past_key_values=cache, max_new_tokens=case.steps, do_sample=True, top_k=0)

    return run


def _block(h, position, visible, keys, values, norm_a, qkv, proj, norm_m, fc, out, scale: float):
    B, H, _, D = keys.shape
    q, k, v = reference.norm_linear(h, norm_a, qkv).view(B, 3, H, 1, D).unbind(1)
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    a = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, scale=scale)
    return reference.norm_mlp(reference.linear_residual(a.reshape(B, -1), proj, h), norm_m, fc, out)


def compiled(case: DecodeCase, device: str):
    """A static cache and torch.compile of each block, as gpt-fast decodes; on a GPU the step is one CUDA graph."""
    block = peers.compiled(_block, device)
    if isinstance(block, Absent):
        return block
    c = PRESETS[case.preset]
    model = models.ours(ModelCase(case.preset, case.B, c.n_ctx, case.activations, "fwd"), device)
    shape = c.n_layer, case.B, c.heads, c.n_ctx, c.head_dim
    keys, values = (torch.zeros(shape, dtype=model.wte.dtype, device=device) for _ in range(2))
    drawn = torch.zeros(case.B, 1, dtype=torch.int64, device=device)
    position, everywhere = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(c.n_ctx, device=device)

    def step():
        h = (model.wte[drawn[:, 0]] + model.wpe[position]).contiguous()
        visible = (everywhere <= position)[None, None, None]
        for i, b in enumerate(model.blocks):
            weights = b.attn.norm, b.attn.qkv, b.attn.proj, b.mlp.norm, b.mlp.fc, b.mlp.proj
            h = block(h, position, visible, keys[i], values[i], *weights, scale=b.attn.scale)
        p = reference.norm_linear(h, model.norm_f, model.head).float().softmax(-1)
        drawn.copy_((p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))
        position.add_(1)

    step = graphed(torch.no_grad()(step)) if device == "cuda" else torch.no_grad()(step)

    def run():
        position.fill_(case.start)
        for _ in range(case.steps):
            step()

    return run


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The step as a CUDA graph, after three runs of it beside the main stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


BUILD = {"ours": ours, "hugging face": hugging_face, "torch.compile": compiled}
NOTES = {
    "ours": "",
    "hugging face": "generate(), dynamic cache; " + models.NOTES["hugging face"],
    "torch.compile": "static cache, each block compiled; on a GPU one CUDA graph a token",
}


def launches(preset_name: str, B: int, arch: str = "sm_90") -> int:
    """Kernel launches a token of the kernels' decoder, recorded on meta tensors: ours and the vendor's products."""
    with torch.no_grad():
        model = ImageGPT(preset(preset_name), impl="triton", device="meta", dtype=torch.bfloat16)
        decoder = decoder_of(model, B)
        with Vendor() as vendor, capture(arch) as found:
            decoder.draw(Sampler())
    return len(found) + sum(name in ("mm", "addmm") for name, *_ in vendor.found)


def check(name: str, device: str, dtype: str, B: int) -> Row:
    """Correctness of decoding at a preset's width: two layers, 40 positions, the log-likelihood of real pictures by
    decode and by the full forward of the same dtype, both against fp64; in fp32 greedy decoding must be the argmax."""
    row = blank("correctness", "decode", DecodeCase(name, B, 40, dtype), device)

    def compared() -> Row:
        torch.manual_seed(0)
        model = ImageGPT(preset(name, n_layer=2, n_ctx=40, vocab=512), device=device)
        torch.nn.init.normal_(model.head, std=0.1)
        exact = ImageGPT(model.config, impl="torch", device=device, dtype=torch.float64)
        exact.load_state_dict(model.to(DTYPES[dtype]).state_dict())
        ids = tokens(B, 40, device)
        with torch.no_grad():
            answers = [m(ids).to(torch.promote_types(m.wte.dtype, torch.float32)) for m in (model, exact)]
        eager, truth = (x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for x in answers)
        errors = compare("log-likelihood", sample.log_likelihood(model, ids), eager, truth)
        note = "" if errors.ok else str(errors)
        if dtype == "fp32":
            greedy = model.generate(B, temperature=0.0)
            differ = int((model(greedy).argmax(-1) != greedy).sum())
            note += f" greedy decoding differs from the full forward's argmax at {differ} positions" if differ else ""
        return dataclasses.replace(
            row, err_vs_fp64=errors.ours_max / errors.peak, eager_err_vs_fp64=errors.eager_max / errors.peak,
            ok=not note, note=note.strip(),
        )  # fmt: skip

    return attempted(row, compared)


NARROW = (
    {}, {"weights": "bf16"}, {"weights": "int8"}, {"cache_dtype": "bf16"}, {"cache_dtype": "fp8"},
    {"weights": "int8", "cache_dtype": "fp8"},
)  # fmt: skip


def narrowing(checkpoint: str, pictures: str, device: str, count: int = 128) -> Iterator[Row]:
    """What narrow weights and caches cost a trained model: nats a pixel of held-out pictures by decoding, less those of
    the full forward in the parameters' dtype; the mean of the pictures and its standard error."""
    model = ImageGPT.from_pretrained(checkpoint, device=device)
    c = model.config
    held_out = data.load(pictures, "test", size=math.isqrt(c.n_ctx)).encoded(model.palette)
    ids = torch.from_numpy(held_out.tokens[:count].astype("int64")).to(device)
    with torch.no_grad():
        full = model(ids).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0].mean(1)
    for options in NARROW:
        more = full - sample.log_likelihood(model, ids, **options).mean(1)
        name = " ".join(f"{v} {k.removesuffix('_dtype')}" for k, v in options.items()) or "as it is"
        note = f"{checkpoint}, {pictures}: {-full.mean():.5f} nats a pixel, {more.mean():+.5f}"
        yield Row(
            "sampling", op="nats", impl=name, dtype=str(model.wte.dtype).removeprefix("torch."), direction="token",
            B=len(ids), N=c.n_ctx, H=c.heads, D=c.head_dim, d=c.width, **stamp(device),
            note=f"{note} +- {more.std() / len(more) ** 0.5:.5f}",
        )  # fmt: skip


def measured(group: list[tuple[str, DecodeCase]], run: Run) -> Iterator[Row]:
    """Rows of the variants of one window, timed in turns: milliseconds a token of all B pictures."""
    variants = []
    for name, case in group:
        note, gpu = NOTES[name], run.device == "cuda"
        if name == "ours" and case.dtype == "bf16":
            note = f"{'' if gpu else 'the kernels on sm_90: '}{launches(case.preset, case.B)} launches a token"
        made = warmed(functools.partial(BUILD[name], case, run.device))
        cost, rate = case.cost(cached=STORED[case.activations] if gpu else 4), case.B / PRESETS[case.preset].n_ctx
        # The start of a picture says nothing about a whole one.
        unit = "pictures" if case.start or case.whole else ""
        row = blank("sampling", name, case, run.device, note=note)
        variants.append(Variant(row, made, cost, scale=1 / case.steps, rate=rate, unit=unit))
    yield from rows_of(variants, run, run.step_timer)


def groups(device: str, presets: Iterable[str]) -> Iterator[list[tuple[str, DecodeCase]]]:
    """What is timed together, each variant and its case; the ends of the range of batches first."""
    for B in (1, 128, 16, 64) if device == "cuda" else (1, 4):
        for name in presets:
            if device == "cuda":
                middle = [(impl, DecodeCase(name, B, 544, "bf16")) for impl in BUILD]
                yield [*middle, ("ours", DecodeCase(name, B, 544, "int8"))]
                yield [("ours", DecodeCase(name, B, 1024, "bf16", steps=1024))]
                continue
            for N in (64, 544):
                yield [
                    *((impl, DecodeCase(name, B, N, "fp32")) for impl in BUILD),
                    *((impl, DecodeCase(name, B, N, "bf16")) for impl in ("ours", "hugging face")),
                    ("ours", DecodeCase(name, B, N, "int8")),
                ]


def rows(wanted: Iterable[list[tuple[str, DecodeCase]]], run: Run, checked: Iterable[str] = "sml") -> Iterator[Row]:
    """Correctness at the widths of the presets `checked`, then the rows of each group, but those of a dtype whose
    correctness is red: int8 weights are multiplied in bf16."""
    batches = (3, 16) if run.device == "cuda" else (3,)  # the kernels' two forms
    for preset_name, dtype, B in itertools.product(checked, ("fp32", "bf16"), batches):
        row = check(preset_name, run.device, dtype, B)
        run.red |= frozenset() if row.ok else {subject(row)}
        yield row
    asked = {"ours", *peers.chosen(BUILD, run.peers)}
    for group in wanted:
        why = {case: run.refusal(("decode", case.activations)) for _, case in group}
        for case in dict.fromkeys(case for name, case in group if name == "ours" and why[case]):
            yield blank("sampling", "ours", case, run.device, note=why[case])
        yield from measured([(name, case) for name, case in group if name in asked and not why[case]], run)
        torch.compiler.reset()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", nargs="+", help="default: s on a CPU, s m l on a GPU")
    parser.add_argument("--peers", default="all")
    parser.add_argument("--seconds", type=float, default=4.0, help="a case, after its warm-up")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; cases past it are not timed")
    parser.add_argument("--nats", nargs=2, metavar=("MODEL", "DATA"), help="only what narrow weights and caches cost")
    parser.add_argument("--out", type=Path, help="append rows as JSON lines to this file as they come")
    args = parser.parse_args(argv)
    presets = args.preset or (["s", "m", "l"] if args.device == "cuda" else ["s"])
    deadline = time.monotonic() + args.budget
    run = Run(args.device, *timers(args.device), peers=args.peers, case_s=args.seconds, deadline=deadline)
    green = True
    for row in narrowing(*args.nats, args.device) if args.nats else rows(groups(args.device, presets), run):
        green &= row.ok
        against = "".join(f", {ratio:.2f}x {peer}" for peer, ratio in row.ratios.items())
        shown = f"{row.median_ms:.3f} ms a token{against}" if row.median_ms else row.note or f"{row.err_vs_fp64:.2e}"
        print(f"{row.suite} {row.op} {row.case} {row.impl}: {shown}", file=sys.stderr, flush=True)
        if args.out:
            with args.out.open("a") as out:
                print(to_json(row), file=out)
    return 0 if green else 1


if __name__ == "__main__":
    sys.exit(main())

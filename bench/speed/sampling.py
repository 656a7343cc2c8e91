"""What a token costs when pictures are sampled: `python bench/run.py --suite sampling`.

Ours against Hugging Face's generate (dynamic cache) and a compiled static-cache loop, on the same weights' shapes, over
the same window of positions; each variant draws every token. N is where the window ends: 64 is the start of a picture,
544 its middle, whose cost is the average token's; 1024 with as many steps is whole pictures.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from bench.cases import Case, decode_case, tokens
from bench.rows import Row
from bench.speed import measure, models, peers
from bench.speed.measure import Run
from igpt.kernels import reference
from igpt.sample import decoder_of
from igpt.sample.draw import Sampler


def ours(case: Case, device: str) -> Callable[[], object]:
    model = models.ours(case.model, device)
    decoder = decoder_of(model, case.B, weights=None if case.dtype == case.activations else case.dtype)
    drawn = tokens(case.B, model.config.n_ctx, device).clone()
    if case.start:
        decoder.prefill(drawn[:, : case.start])
    return lambda: decoder.sample(drawn, case.start, case.N, Sampler())


def hugging_face(case: Case, device: str):
    """generate() of transformers' ImageGPT, sampling; the cache up to the window is there already."""
    model = models.hugging_face(case.model, device).eval()
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


def captured(fn: Callable[[], object]) -> Callable[[], None]:
    """A call as a CUDA graph. What is lazily set up must be there before the capture: a few calls go ahead beside the
    main stream."""
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def compiled(case: Case, device: str):
    """A static cache and torch.compile of each block, as gpt-fast decodes; on a GPU the step is one CUDA graph."""
    c, block = case.config, peers.compiled(_block, device)
    model = models.ours(case.model, device)
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

    step = torch.no_grad()(step)
    step = captured(step) if device == "cuda" else step

    def run():
        position.fill_(case.start)
        for _ in range(case.steps):
            step()

    return run


def build(name: str, case: Case, device: str) -> Callable[[], object]:
    return {"ours": ours, "hugging face": hugging_face, "torch.compile": compiled}[name](case, device)


NOTES = {
    "ours": "",
    "hugging face": "generate(), dynamic cache; " + models.NOTES["hugging face"],
    "torch.compile": "static cache, each block compiled; on a GPU one CUDA graph a token",
}


def groups(device: str, presets: Iterable[str]) -> Iterator[list[tuple[str, Case]]]:
    """What is timed together, each variant and its case; the ends of the range of batches first."""
    for B in (1, 128, 16, 64) if device == "cuda" else (1, 4):
        for name in presets:
            if device == "cuda":
                middle = [(impl, decode_case(name, B, 544, "bf16")) for impl in NOTES]
                yield [*middle, ("ours", decode_case(name, B, 544, "int8"))]
                yield [("ours", decode_case(name, B, 1024, "bf16", steps=1024))]
                continue
            for N in (64, 544):
                fp32, bf16, int8 = (decode_case(name, B, N, dtype, cached=4) for dtype in ("fp32", "bf16", "int8"))
                bf16s = [("ours", bf16), ("hugging face", bf16)]
                yield [*((impl, fp32) for impl in NOTES), *bf16s, ("ours", int8)]


def rows(wanted: Iterable[list[tuple[str, Case]]], run: Run) -> Iterator[Row]:
    """Rows of each group, milliseconds a token of all B pictures."""
    return measure.rows("sampling", wanted, build, NOTES, run)

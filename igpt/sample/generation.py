"""Sampling whole pictures, and the rest of pictures whose first pixels are given."""

from collections.abc import Iterator

import torch

from igpt.kernels import choose
from igpt.sample.decoder import Decoder
from igpt.sample.draw import Sampler


def generate(model, batch: int = 1, **options) -> torch.Tensor:
    """Sample whole pictures: tokens (batch, n_ctx) int64. Options as in `complete`."""
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: got {batch!r}, expected a positive integer")
    return _whole(model, torch.empty(batch, 0, dtype=torch.int64, device=model.wte.device), **options)


def complete(model, tokens_BN, keep: int, **options) -> torch.Tensor:
    """Keep the first `keep` pixels (raster order) of each picture and sample the rest: tokens (B, n_ctx) int64.

    temperature   divides the logits; 0 takes the likeliest token each time (greedy). Default 1.
    top_k, top_p  only the k likeliest tokens; only the likeliest that together reach the mass p. Default: all.
    seed, first   picture i draws from the counters of (seed, first + i): the same pictures whatever the batch split. On
                  a GPU logits of up to 8 pictures and of more differ by roundings: decoders made for the same `total`
                  keep every part of a split to one kind.
    weights       None (the parameters' dtype), "bf16", or "int8" with one scale an output channel.
    cache_dtype   None (fp32 on a CPU, the weights' dtype on a GPU), "fp32", "bf16" or "fp8".
    progress      called after each position with the number of pixels just drawn, B.
    decoder       one that decoder_of made for this model and batch (weights and cache_dtype are then its own): what it
                  prepares, on a GPU a CUDA graph, is not prepared again.

    Raises ValueError for a bad option, a keep of 0 or all, tokens of another size or range, a BERT model, and a batch
    whose cache doesn't fit, before any work."""
    n_ctx = model.config.n_ctx
    if tokens_BN.dim() != 2 or tokens_BN.shape[1] != n_ctx:
        raise ValueError(f"tokens: got shape {tuple(tokens_BN.shape)}, expected (B, {n_ctx})")
    if not isinstance(keep, int) or not 0 < keep < n_ctx:
        raise ValueError(f"keep: got {keep!r}, expected 1 to {n_ctx - 1} of the {n_ctx} pixels")
    return _whole(model, tokens_BN[:, :keep], **options)


def _whole(model, kept_BK, **options):
    drawn = stream(model, kept_BK, model.config.n_ctx, **options)
    return torch.cat([kept_BK.long().to(model.wte.device), *drawn], 1)


def _check_tokens(model, tokens_BN) -> None:
    """Raises ValueError unless these can be the first pixels of some pictures."""
    c = model.config
    if tokens_BN.dim() != 2 or not tokens_BN.shape[0] or not 1 <= tokens_BN.shape[1] <= c.n_ctx:
        raise ValueError(f"tokens: got shape {tuple(tokens_BN.shape)}, expected (B >= 1, 1 to {c.n_ctx})")
    if tokens_BN.is_floating_point() or tokens_BN.is_complex() or tokens_BN.dtype == torch.bool:
        raise ValueError(f"tokens: got {tokens_BN.dtype}, expected integers in [0, {c.vocab})")
    low, high = (int(t) for t in torch.aminmax(tokens_BN.long()))
    if low < 0 or high >= c.vocab:
        raise ValueError(f"tokens: got values in [{low}, {high}], expected integers in [0, {c.vocab})")


def log_likelihood(model, tokens_BN, *, weights: str | None = None, cache_dtype: str | None = None) -> torch.Tensor:
    """Log-probability in nats of each pixel, fp32 or wider (B, N), computed one pixel at a time as sampling does: what
    int8 weights or an fp8 cache cost is its difference from the full forward's.

    Raises ValueError for tokens of another shape, dtype or range, and for what decoder_of refuses."""
    _check_tokens(model, tokens_BN)
    tokens_BN = tokens_BN.long().to(model.wte.device)
    decoder = decoder_of(model, tokens_BN.shape[0], weights=weights, cache_dtype=cache_dtype)
    with torch.autocast(model.wte.device.type, enabled=False):
        steps = [
            decoder.step(i, tokens_BN[:, i - 1]).log_softmax(-1).gather(-1, tokens_BN[:, i : i + 1])
            for i in range(tokens_BN.shape[1])
        ]
    return torch.cat(steps, 1)


def stream(
    model, kept_BK, every: int, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    seed: int = 0, first: int = 0, weights: str | None = None, cache_dtype: str | None = None, progress=None,
    decoder=None,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The pixels after `kept_BK` while they are drawn, `every` at a time: int64 (B, every), the last ones fewer.

    kept_BK: integers (B, K), the first pixels of B pictures; K may be 0. The pixels are those of `complete`, whose
    options these are. Raises its ValueErrors at the call; pixels are drawn as they are asked for, and no more."""
    if kept_BK.dim() != 2 or kept_BK.shape[1]:
        _check_tokens(model, kept_BK)
    c, device, (B, keep) = model.config, model.wte.device, kept_BK.shape
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every: got {every!r}, expected a positive integer")
    sampler = Sampler(temperature, top_k, top_p, seed, first).check(c.vocab)
    if decoder is None:
        decoder = decoder_of(model, B, weights=weights, cache_dtype=cache_dtype)
    elif decoder.batch != B:
        raise ValueError(f"decoder: got one for {decoder.batch} pictures, expected {B}")
    tokens = torch.zeros(B, c.n_ctx, dtype=torch.int64, device=device)
    tokens[:, :keep] = kept_BK

    def drawn():
        for start in range(keep, c.n_ctx, every):
            stop = min(start + every, c.n_ctx)
            with torch.autocast(device.type, enabled=False):
                if keep and start == keep:
                    decoder.prefill(tokens[:, :keep])
                decoder.sample(tokens, start, stop, sampler, progress)
            yield tokens[:, start:stop]

    return drawn()


def decoder_of(model, batch: int, **options) -> Decoder:
    """The decoder that the model's `impl` asks for: the kernels', or the one in plain PyTorch."""
    if choose.kernels(model.impl, model.wte):
        from igpt.sample.kernel_decoder import KernelDecoder

        return KernelDecoder(model, batch, **options)
    return Decoder(model, batch, **options)

"""Decoding by the kernels: each step the same launches, which read the position from device memory, so that one CUDA
graph holds a step and a picture is as many replays. The host waits for nothing until the last pixel is drawn."""

import torch

from igpt.kernels.decode_attention import decode_attention
from igpt.kernels.decode_linear import decode_linear_residual, decode_norm_linear
from igpt.kernels.decode_sample import decode_embed, decode_sample
from igpt.sample.decoder import Decoder, quantise


def prepared(weight, bias, kind: str | None) -> dict:
    """The operands of one product, as the kernels name them."""
    if kind == "int8":
        weight, scale = quantise(weight)
        return {"weight": weight, "scale": scale, "bias": bias}
    return {"weight": weight.to(torch.bfloat16 if kind else weight.dtype).contiguous(), "bias": bias}


class Layer:
    """One block's weights, the norms' gains folded in, and its part of the cache."""

    def __init__(self, block, cache, kind: str | None):
        a, m = block.attn, block.mlp
        self.scale, (self.keys, self.values) = a.scale, cache
        self.qkv = prepared(a.qkv * a.norm, a.b_qkv, kind)
        self.proj = prepared(a.proj, a.b_proj, kind)
        self.fc = prepared(m.fc * m.norm, m.b_fc, kind)
        self.out = prepared(m.proj, m.b_proj, kind)


class KernelDecoder(Decoder):
    """A Decoder whose step is kernels only, on a GPU or in the interpreter. What a step reads and writes stays where it
    is: `position`, `tokens`, `seed`, `pictures` and the cache."""

    def prepare(self, weights: str | None) -> None:
        model, c, device = self.model, self.config, self.device
        self.layers = [Layer(block, cache, weights) for block, cache in zip(model.blocks, self.cache)]
        self.wte, self.wpe, self.sos = model.wte, model.wpe, model.sos
        self.head = prepared(model.head * model.norm_f, None, "bf16" if weights else None)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.pictures = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(self.batch, c.n_ctx, dtype=torch.int64, device=device)
        self.steps = {}

    def logits(self):
        """(B, V) of the pixel at `position`, whose key and value join the cache."""
        c, B = self.config, self.batch
        form = {"eps": c.norm_eps, "centred": c.centred}
        h = decode_embed(self.tokens, self.wte, self.wpe, self.sos, self.position, dtype=self.wide)
        for layer in self.layers:
            qkv = decode_norm_linear(h, None, **layer.qkv, **form).view(B, 3, c.heads, c.head_dim)
            a = decode_attention(qkv, layer.keys, layer.values, self.position, layer.scale)
            h = decode_linear_residual(a.view(B, -1), residual=h, **layer.proj)
            hidden = decode_norm_linear(h, None, **layer.fc, **form, gelu=True)
            h = decode_linear_residual(hidden, residual=h, **layer.out)
        return decode_norm_linear(h, None, **self.head, **form, dtype=self.wide)

    @torch.inference_mode()
    def step(self, position: int, previous_B):
        if position:
            self.tokens[:, position - 1] = previous_B
        self.position.fill_(position)
        return self.logits()

    def draw(self, sampler) -> None:
        """One pixel: logits, the draw into `tokens`, and the position moves on."""
        how = sampler.temperature, sampler.top_k, sampler.top_p
        decode_sample(self.logits(), self.tokens, self.position, self.pictures, self.seed, *how)
        self.position.add_(1)

    def replayable(self, sampler):
        """`draw` as a call without host work: a graph on a GPU, one for each temperature, top_k and top_p."""
        if self.device.type != "cuda":
            return lambda: self.draw(sampler)
        how = sampler.temperature, sampler.top_k, sampler.top_p
        if how not in self.steps:
            start = self.position.clone()
            self.draw(sampler)  # compiles what is new; drawing the same pixel again changes nothing
            self.position.copy_(start)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.draw(sampler)
            self.steps[how] = graph.replay
        return self.steps[how]

    @torch.inference_mode()
    def sample(self, tokens_BN, start: int, stop: int, sampler, progress=None):
        self.tokens.copy_(tokens_BN)
        self.position.fill_(start)
        self.seed.fill_(sampler.seed)
        torch.arange(sampler.first, sampler.first + self.batch, out=self.pictures)
        draw = self.replayable(sampler)
        for _ in range(start, stop):
            draw()
            if progress is not None:
                progress(self.batch)
        tokens_BN[:, start:stop] = self.tokens[:, start:stop]

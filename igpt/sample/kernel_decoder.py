"""Decoding by the kernels: each step the same launches, which read the position from device memory, so that one CUDA
graph holds a step and a picture is as many replays. The host waits for nothing until the last pixel is drawn.

Up to choose.FEW_PICTURES a step is five kernels a layer, chained, whose products are matrix-vector kernels: norm and
qkv; attention in parts; their join, projection and residual; norm, fc and gelu; projection and residual. Beyond it is
eight: the vendor's four products, two norms, attention and gelu. Embedding, head and draw are three more (and a norm).

Prediction for an H200, us a token at window 512 in bf16, none of it timed yet. Few: a layer takes 9.4 us and its
weights at 3.7 TB/s, as fitted to a prototype's 267 / 585 / 1190, and the ends 8. Many: the vendor's products as
measured, attention at 85% of its bytes' floor, 3 for each row kernel.

         launches      MB (int8)      1 picture (int8)     128: products + attention + rows
    S    123 / 196     177 ( 101)      275 (255)            440 +  880 + 220 = 1540
    M    183 / 292     983 ( 530)      590 (470)            910 + 2640 + 330 = 3880
    L    243 / 388    2870 (1510)     1195 (825)           1650 + 5290 + 430 = 7370

One persistent kernel was counted instead and not built: two barriers of a head's programs (0.7 us) and three of the
grid (1.15) a layer and five phases of 0.9 are 9.4 us again. It gains what weights streamed through shared memory across
the barriers hide, at best: S 225, M 375, L 700 to 750, which is 1.2, 1.55 and 1.6 times this.

A picture's numbers are the same in any batch of one kind, to the bit; between the kinds they differ as roundings do. So
the kind follows from how many pictures are drawn in all (`total`), and a batch of them is of the same kind.
"""

import torch

from igpt.kernels import choose
from igpt.kernels.decode_attention import decode_attention, decode_attention_parts
from igpt.kernels.decode_linear import decode_linear_residual, decode_norm_linear
from igpt.kernels.decode_rows import decode_norm, decode_product
from igpt.kernels.decode_sample import decode_embed, decode_sample
from igpt.kernels.norm_mlp import gelu_op
from igpt.sample.decoder import Decoder, quantise


def prepared(weight, bias, kind: str | None, is_few: bool) -> dict:
    """The operands of one product, as the kernels name them. The vendor takes no int8: it gets what those stand for,
    whose bytes are no longer what a step waits for."""
    dtype = torch.bfloat16 if kind else weight.dtype
    if kind == "int8":
        weight, scale = quantise(weight)
        if is_few:
            return {"weight": weight, "scale": scale, "bias": bias}
        weight = weight * scale[:, None]
    return {"weight": weight.to(dtype).contiguous(), "bias": bias if bias is None else bias.to(dtype)}


class Layer:
    """One block's weights, the norms' gains folded in, and its part of the cache."""

    def __init__(self, block, cache, kind: str | None, is_few: bool):
        a, m = block.attn, block.mlp
        self.scale, (self.keys, self.values) = a.scale, cache
        self.qkv = prepared(a.qkv * a.norm, a.b_qkv, kind, is_few)
        self.proj = prepared(a.proj, a.b_proj, kind, is_few)
        self.fc = prepared(m.fc * m.norm, m.b_fc, kind, is_few)
        self.out = prepared(m.proj, m.b_proj, kind, is_few)


class KernelDecoder(Decoder):
    """A Decoder whose step is kernels only, on a GPU or in the interpreter. What a step reads and writes stays where it
    is: `position`, `tokens`, `seed`, `pictures` and the cache."""

    def prepare(self, weights: str | None) -> None:
        model, c, device, B = self.model, self.config, self.device, self.batch
        self.is_few = choose.matrix_vector(self.total)
        self.layers = [Layer(block, cache, weights, self.is_few) for block, cache in zip(model.blocks, self.cache)]
        self.wte, self.wpe, self.sos = model.wte, model.wpe, model.sos
        self.head = prepared(model.head * model.norm_f, None, "bf16" if weights else None, self.is_few)
        if not self.is_few:
            self.head["weight"] = self.head["weight"].to(self.wide)  # the vendor's logits have its operands' dtype
            self.gain = torch.ones(c.width, device=device)
        self.position = torch.zeros(B, dtype=torch.int32, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.pictures = torch.zeros(B, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(B, c.n_ctx, dtype=torch.int64, device=device)
        self.steps = {}

    def logits(self):
        """(B, V) of the pixel at `position`, whose key and value join the cache."""
        h = decode_embed(self.tokens, self.wte, self.wpe, self.sos, self.position, dtype=self.wide)
        return self.logits_of_few(h) if self.is_few else self.logits_of_many(h)

    def logits_of_few(self, h):
        c, B = self.config, self.batch
        form = {"eps": c.norm_eps, "centred": c.centred}
        for layer in self.layers:
            qkv = decode_norm_linear(h, **layer.qkv, **form).view(B, 3, c.heads, c.head_dim)
            parts = decode_attention_parts(qkv, layer.keys, layer.values, self.position, layer.scale)
            h = decode_linear_residual(parts, residual=h, **layer.proj)
            hidden = decode_norm_linear(h, **layer.fc, **form, gelu=True)
            h = decode_linear_residual(hidden, residual=h, **layer.out)
        return decode_norm_linear(h, **self.head, **form, dtype=self.wide)

    def logits_of_many(self, h):
        c, B, add = self.config, self.batch, None
        form = {"gain": self.gain, "eps": c.norm_eps, "centred": c.centred, "dtype": self.dtype}
        for layer in self.layers:
            n = decode_norm(h, add, **form)
            qkv = decode_product(n, **layer.qkv)[:B].view(B, 3, c.heads, c.head_dim)
            a = decode_attention(qkv, layer.keys, layer.values, self.position, layer.scale, rows=len(n))
            n = decode_norm(h, decode_product(a.flatten(1), **layer.proj), **form)
            add = decode_product(gelu_op(decode_product(n, **layer.fc), False), **layer.out)
        return decode_product(decode_norm(h, add, **form | {"dtype": self.wide}), **self.head)[:B]

    @torch.inference_mode()
    def step(self, position: int, previous_B):
        if position:
            self.tokens[:, position - 1] = previous_B
        self.position.fill_(position)
        return self.logits()

    def draw(self, sampler) -> None:
        """One pixel: logits and the draw into `tokens`, which moves the position on."""
        how = sampler.temperature, sampler.top_k, sampler.top_p
        decode_sample(self.logits(), self.tokens, self.position, self.pictures, self.seed, *how)

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

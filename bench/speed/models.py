"""Whole models, Image GPT and ViT: ours, and what it is timed against, on the same real pictures.

Directions: "fwd" is logits without gradients, "fwd+bwd" the loss and every gradient, "step" that and fused Adam: on a
GPU ours is what `igpt train` does, one CUDA graph.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import igpt
from bench.cases import DTYPES, Case, pictures, tokens
from bench.rows import Row
from bench.speed import measure, peers
from bench.speed.measure import Run
from bench.speed.peers import Absent, compiled, fused_attention
from igpt import ImageGPT, ViT
from igpt.data import resize_all
from igpt.hf.patch import apply_igpt_kernels
from igpt.kernels import reference

SDPA_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def ours(case: Case, device: str) -> ImageGPT:
    """Random weights from one seed; the head drawn too, since with the zeros of the init every answer is right."""
    torch.manual_seed(0)
    model = ImageGPT.from_preset(case.preset, device=device, dtype=DTYPES[case.dtype], n_ctx=case.N)
    torch.nn.init.normal_(model.head, std=0.02)
    return model


def eager_logits(model: ImageGPT, tokens_BN, attention: Callable = reference.attention, block: Callable | None = None):
    """The reference, operation by operation, on our model's weights: the specification of the whole model."""
    c, block = model.config, block or eager_block
    h = reference.embed(tokens_BN, model.wte, model.wpe, model.sos)
    for b in model.blocks:
        weights = b.attn.norm, b.attn.qkv, b.attn.proj, b.mlp.norm, b.mlp.fc, b.mlp.proj
        h = block(h, *weights, c.heads, b.attn.scale, c.norm_eps, c.causal, attention)
    return F.linear(reference.norm(h, model.norm_f, c.norm_eps), model.head)


def eager_block(h, norm_a, qkv, proj, norm_m, w_fc, w_proj, heads, scale, eps, causal, attention):
    packed = reference.pack_heads(reference.norm_linear(h, norm_a, qkv, eps=eps), heads)
    a = attention(*packed.unbind(2), causal, scale)
    h = reference.linear_residual(a.flatten(-2), proj, h)
    return reference.norm_mlp(h, norm_m, w_fc, w_proj, eps=eps)


def hugging_face(case: Case, device: str):
    """transformers' ImageGPT of the same size. Its attention divides by int(sqrt(head dim)), right only for 64, and
    is left as shipped; dropout, 0.1 by its default and none in the paper, is off, in its favour."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    c = case.config
    config = ImageGPTConfig(
        n_positions=case.N, n_embd=c.width, n_layer=c.n_layer, n_head=c.heads, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    with torch.device(device):  # a CPU draws L's weights for a minute
        model = ImageGPTForCausalImageModeling(config)
    return model.to(device, DTYPES[case.dtype])  # its norms' gains are on the CPU still


def hugging_face_logits(model, tokens_BN):
    sos = tokens_BN.new_full((len(tokens_BN), 1), model.config.vocab_size - 1)
    return model(torch.cat([sos, tokens_BN[:, :-1]], 1)).logits


def nll(logits, tokens_BN):
    return F.cross_entropy(logits.float().flatten(0, 1), tokens_BN.flatten())


def timed(direction: str, model, forward: Callable, loss: Callable, batch: tuple, graph: bool) -> Callable[[], object]:
    """The call that is timed, of forward(batch[0]) or of loss(*batch). graph: a step is a CUDA graph on a GPU."""
    if direction == "fwd":
        return torch.no_grad()(functools.partial(forward, batch[0]))
    optimizer, on_gpu = None, batch[0].is_cuda
    if direction == "step":
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu)
        if graph and on_gpu:
            replay = igpt.graphed(loss, optimizer)
            for _ in range(3):  # two steps as they are, and the capture
                replay(*batch)
            return lambda: replay(*batch)

    def step():
        model.zero_grad(set_to_none=True)
        loss(*batch).backward()
        if optimizer:
            optimizer.step()

    if optimizer:
        step()  # makes the optimizer's state: what fits from here on, fits when it is timed
    return step


def build(name: str, case: Case, device: str) -> Callable[[], object]:
    """The timed call of one implementation."""
    if case.op == "vit":
        return vit(name, case, device)
    batch = (tokens(case.B, case.N, device),)
    if name == "ours fp8" and (device, case.dtype, case.direction) != ("cuda", "bf16", "step"):
        raise Absent("a training step's in bf16, on a GPU")
    if name.startswith("ours"):
        model = ours(case, device)
        model.fp8 = name == "ours fp8"
        return timed(case.direction, model, model, model.loss, batch, graph=True)
    if name.startswith("hugging face"):
        model, logits = hugging_face(case, device), hugging_face_logits
        if name == "hugging face patched":
            apply_igpt_kernels(model)
    elif name == "eager":
        model, logits = ours(case, device), eager_logits
    elif name == "torch.compile graphed" and (device, case.direction) != ("cuda", "step"):
        raise Absent("a training step's, on a GPU")
    else:
        model, block = ours(case, device), compiled(eager_block, device)

        def logits(model, ids):
            with sdpa_kernel(SDPA_ORDER, set_priority=True):
                return eager_logits(model, ids, fused_attention, block)

    def loss(ids):
        return F.cross_entropy(logits(model, ids).float().flatten(0, 1), ids.flatten())

    return timed(case.direction, model, functools.partial(logits, model), loss, batch, "graphed" in name)


def vit(name: str, case: Case, device: str) -> Callable[[], object]:
    """The same of a ViT, by labels: ours, or Hugging Face's of the same size."""
    c, dtype = case.config, DTYPES[case.dtype]
    pixels = torch.from_numpy(resize_all(pictures(case.B), c.size)).to(device)
    labels = torch.arange(case.B, device=device) % c.classes
    torch.manual_seed(0)
    if name == "ours":
        model = ViT(c, device=device, dtype=dtype)
        torch.nn.init.normal_(model.head, std=0.02)
        return timed(case.direction, model, model, model.loss, (pixels, labels), graph=True)
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(
        hidden_size=c.width, num_hidden_layers=c.n_layer, num_attention_heads=c.heads, intermediate_size=c.inner,
        image_size=c.size, patch_size=c.patch, num_labels=c.classes,
    )).to(device, dtype)  # fmt: skip
    planes = (pixels / 127.5 - 1).to(dtype).permute(0, 3, 1, 2).contiguous()
    return timed(case.direction, model, model, lambda x, y: model(x, labels=y).loss, (planes, labels), graph=False)


NOTES = {
    "ours": "",
    "ours fp8": "igpt train --precision fp8: the blocks' products with weights in e4m3",
    "hugging face": "as shipped, dropout off; Image GPT's scores divided by int(sqrt(head dim)), right only for 64",
    "hugging face patched": "igpt.hf.apply_igpt_kernels on the same",
    "eager": "kernels/reference.py on our weights",
    "torch.compile": f"SDPA (cuDNN first on a GPU) and the reference, compiled block by block; {peers.COMPILED_NOTE}",
    "torch.compile graphed": "the same by igpt.graphed, which is what ours runs on a GPU: one CUDA graph a step",
}


def rows(
    cases: Iterable[Case], run: Run, keep: Callable[[str, Case], bool] = lambda *_: True
) -> Iterator[Row]:
    """Rows of whole models. Cases that differ in their dtype alone are timed together."""
    groups = defaultdict(list)
    for case in cases:
        names = ("ours", "hugging face") if case.op == "vit" else NOTES
        groups[replace(case, dtype="")] += [(name, case) for name in names if keep(name, case)]
    return measure.rows("model", groups.values(), build, NOTES, run)

"""Image GPT: a decoder-only transformer over palette tokens (Chen et al. 2020; OpenAI's src/model.py, here [code]).

    model = ImageGPT.from_preset("s")
    loss = model.loss(tokens)            # nats a pixel
    features = model.features(tokens)    # (L+1, B, d): the linear probe's

Shape suffixes: B batch, N positions, L layers, H heads, D head dim, d width, V palette size.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from igpt import convert, ops, sample
from igpt.config import PRESETS, Blocks, Config, preset
from igpt.kernels import checks

MASK_PROBABILITY = 0.15
RECOMPUTE = ("none", "mlp", "block")


def without_autocast(t):
    """A context for what casts by itself: autocast's own casts would only do it twice. On "meta" there is none."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def total(h, add):
    return h if add is None else h + add


def folded(bias, weight, b_norm):
    """weight @ (n + b_norm) + bias is weight @ n + this: a norm's bias costs a product with one vector."""
    return bias if b_norm is None else torch.addmv(bias, weight, b_norm)


class Attention(nn.Module):
    """attn(norm(h)): dense multi-head attention, causal for AR, full for BERT and ViT, no dropout."""

    def __init__(self, config: Blocks, layer: int):
        super().__init__()
        d, self.config = config.width, config
        self.scale = (config.attn_scale or config.head_dim**-0.5) / (layer + 1 if config.scale_by_layer else 1)
        self.norm = nn.Parameter(torch.empty(d))
        self.qkv = nn.Parameter(torch.empty(3 * d, d))
        self.proj = nn.Parameter(torch.empty(d, d))
        self.b_qkv = nn.Parameter(torch.empty(3 * d)) if config.bias else None
        self.b_proj = nn.Parameter(torch.empty(d)) if config.bias else None
        self.b_norm = nn.Parameter(torch.empty(d)) if config.norm_bias else None

    def forward(self, h_BNd, add_BNd, impl: str, fp8: bool = False):
        c, (B, N, d) = self.config, h_BNd.shape
        qkv, h_BNd = ops.norm_linear(
            h_BNd, self.norm, self.qkv, folded(self.b_qkv, self.qkv, self.b_norm),
            add=add_BNd, through=True, eps=c.norm_eps, centred=c.centred, fp8=fp8, impl=impl,
        )  # fmt: skip
        qkv = qkv.view(B, N, 3, c.heads, c.head_dim)
        a = ops.attention(qkv, causal=c.causal, scale=self.scale, impl=impl)
        return ops.linear(a.reshape(B, N, d), self.proj, self.b_proj, fp8=fp8, impl=impl), h_BNd


class MLP(nn.Module):
    """proj(gelu(fc(norm(h)))), d -> 4d -> d, with the config's gelu."""

    def __init__(self, config: Blocks):
        super().__init__()
        d, inner, self.config = config.width, config.inner, config
        self.norm = nn.Parameter(torch.empty(d))
        self.fc = nn.Parameter(torch.empty(inner, d))
        self.proj = nn.Parameter(torch.empty(d, inner))
        self.b_fc = nn.Parameter(torch.empty(inner)) if config.bias else None
        self.b_proj = nn.Parameter(torch.empty(d)) if config.bias else None
        self.b_norm = nn.Parameter(torch.empty(d)) if config.norm_bias else None

    def forward(self, h_BNd, add_BNd, impl: str, fp8: bool = False, recompute: bool = False):
        c = self.config
        return ops.norm_mlp(
            h_BNd, self.norm, self.fc, self.proj, folded(self.b_fc, self.fc, self.b_norm), self.b_proj,
            add=add_BNd, through=True, eps=c.norm_eps, centred=c.centred, activation=c.activation,
            recompute=recompute, fp8=fp8, impl=impl,
        )  # fmt: skip


class Block(nn.Module):
    """Both branches on the residual stream h + add: what one adds, the next one's norm sums up (igpt/ops/)."""

    def __init__(self, config: Blocks, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, h_BNd, add_BNd, impl: str, fp8: bool = False, recompute: bool = False):
        add_BNd, h_BNd = self.attn(h_BNd, add_BNd, impl, fp8)
        add_BNd, h_BNd = self.mlp(h_BNd, add_BNd, impl, fp8, recompute)
        return h_BNd, add_BNd


class Transformer(nn.Module):
    """What the models share. `impl` ("auto", "triton", "torch") is how every operation runs (kernels/choose.py).
    `recompute`: what training drops and computes again in backward: "none", each "mlp"'s activation, or all of each
    "block". `fp8`: where gradients are made, the blocks' products with weights run in 8 bits (kernels/fp8.py).

    Activations have the parameters' dtype or, under torch.autocast, autocast's, the residual stream included; losses
    and log-probabilities are at least fp32."""

    config_class, sizes = Blocks, {}
    entered_by = ("loss",)  # the methods by which training enters, besides forward: FSDP2 must be told

    def __init__(self, config: Blocks, *, impl: str = "auto", device=None, dtype=None):
        super().__init__()
        if impl not in ops.IMPLS:
            raise ValueError(f"impl: got {impl!r}, expected one of {ops.IMPLS}")
        self.config, self.impl, self.recompute, self.fp8 = config, impl, "none", False
        self.palette = None  # the Palette that came with the weights, if one did; save_pretrained passes it on
        self.trained = None  # where in its run they were made, if we know: convert.runs.Trained
        self.class_names = ()  # what the classifier's rows are called, if we know; save_pretrained passes them on
        with torch.device(device if device is not None else torch.get_default_device()):
            self.make_ends(config)
            self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.to(dtype=dtype)
        if self.device.type != "meta":
            self.init_weights()

    @classmethod
    def from_preset(cls, name: str, *, impl: str = "auto", device=None, dtype=None, **overrides):
        """A model of a named size (config.py) with random weights; overrides replace fields of its configuration.

        Raises ValueError for an unknown name or field."""
        return cls(preset(name, cls.sizes, **overrides), impl=impl, device=device, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls, source, *, step=None, impl: str = "auto", device=None, dtype=None, attn_scale: str = "exact"
    ):
        """A model from our directory, a run's, a Hugging Face directory or hub id ("org/name" or "org/name@revision"),
        an OpenAI TF1 checkpoint prefix, or the box ("builtin:emoji", 1 M parameters); the checkpoint's dtype unless
        `dtype` is given. `step`: which checkpoint of a run, a number or "last"; default: the best by validation loss.
        `attn_scale`: of Hugging Face's Image GPT, "exact", or "hf" for 1/int(sqrt(head dim)). `palette` is the one
        beside the weights, or None, `class_names` are the classifier's. Raises ValueError naming what is wrong, before
        anything is allocated."""
        checkpoint = convert.open_checkpoint(source, step, attn_scale)
        if type(checkpoint.config) is not cls.config_class:
            names = type(checkpoint.config).__name__, cls.config_class.__name__
            raise ValueError(f"source: {source} is a model of a {names[0]}, expected one of a {names[1]}")
        model = cls(checkpoint.config, impl=impl, device="meta", dtype=dtype or checkpoint.dtype)
        model.to_empty(device=device if device is not None else torch.get_default_device())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(checkpoint.tensors[name].read())
        model.palette, model.trained, model.class_names = checkpoint.palette, checkpoint.trained, checkpoint.classes
        return model

    def save_pretrained(self, path, format: str = "igpt") -> None:
        """Write model.safetensors and config.json, ours ("igpt") or Hugging Face's ("hf")."""
        convert.save(self, path, format=format)

    @property
    def device(self) -> torch.device:
        return self.norm_f.device

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def draw(self, std: dict[str, float], generator: torch.Generator | None) -> None:
        """Every weight anew: norms' gains 1, those of a deviation in `std` normal, all others 0."""
        for name, p in self.named_parameters():
            key = name.split(".", 2)[-1] if name.startswith("blocks.") else name
            if key.rpartition(".")[2] in ("norm", "norm_f"):
                p.fill_(1.0)
            elif std.get(key, 0.0) == 0.0:
                p.zero_()
            else:
                p.normal_(0.0, std[key], generator=generator)

    def stream_dtype(self) -> torch.dtype:
        kind = self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.norm_f.dtype

    def through_blocks(self, h, each=None):
        """The residual stream after the last block, before the final norm: (B, N, d) of the first block's input.

        `each(h, gain)` is called with every block's input: the hook of `features`."""
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute: got {self.recompute!r}, expected one of {RECOMPUTE}")
        add, fp8 = None, self.fp8 and torch.is_grad_enabled()
        for name, value, expected in (("recompute", self.recompute, "none"), ("fp8", self.fp8, False)):
            if value != expected and checks.is_transformed():
                raise ValueError(f"{name}: got {value!r} under torch.func, which cannot: expected {expected!r}")
        for block in self.blocks:
            if each is not None:
                h, add = total(h, add), None
                each(h, block.attn.norm)
            if self.recompute == "block" and torch.is_grad_enabled():
                # A block draws nothing, and a CUDA graph cannot read a generator's state.
                h, add = checkpoint(block, h, add, self.impl, fp8, use_reentrant=False, preserve_rng_state=False)
            else:
                h, add = block(h, add, self.impl, fp8, self.recompute == "mlp")
        return total(h, add)

    def normed(self, h, weight):
        """norm(h) with this model's eps and form, without a bias: of a block, or the final one."""
        c = self.config
        with without_autocast(h):
            return ops.norm(h, weight, eps=c.norm_eps, centred=c.centred, impl=self.impl)


class ImageGPT(Transformer):
    """The model. Raises ValueError for tokens of a wrong shape, dtype or range."""

    config_class, sizes = Config, PRESETS

    def make_ends(self, config: Config) -> None:
        d = config.width
        self.wte = nn.Parameter(torch.empty(config.vocab, d))
        self.wpe = nn.Parameter(torch.empty(config.n_ctx, d))
        self.sos = nn.Parameter(torch.empty(d)) if config.causal else None
        self.norm_f = nn.Parameter(torch.empty(d))
        self.head = nn.Parameter(torch.empty(config.vocab, d))
        self.classifier = nn.Parameter(torch.empty(config.classes, d)) if config.classes else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew. All normal with mean 0 and standard deviation [code]:

        wte, sos            0.02            attention q, k, v    1 / sqrt(d)
        wpe                 0.01            attention output     1 / sqrt(d L)
        head, classifier    0 (zeros)       MLP fc, proj         0.02
        norm gains          1 (ones)        biases, if any       0 (zeros)

        The zero head makes the first loss exactly ln V."""
        d, L = self.config.width, self.config.n_layer
        std = {
            "wte": 0.02, "sos": 0.02, "wpe": 0.01, "head": 0.0, "classifier": 0.0,
            "attn.qkv": d**-0.5, "attn.proj": (d * L) ** -0.5, "mlp.fc": 0.02, "mlp.proj": 0.02,
        }  # fmt: skip
        self.draw(std, generator)

    def flops_per_token(self, training: bool = True) -> float:
        """FLOPs a token at n_ctx positions: 2 for each weight of a product, attention's two products over the keys a
        query sees (on average (N + 1) / 2 when causal); times 3 in training (backward is two products for each)."""
        c = self.config
        products = c.n_layer * (4 * c.width**2 + 2 * c.width * c.inner) + c.vocab * c.width
        keys = (c.n_ctx + 1) / 2 if c.causal else c.n_ctx
        forward = 2 * products + c.n_layer * 4 * keys * c.width
        return 3 * forward if training else forward

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values that decoding keeps for one position of one picture."""
        return 2 * self.config.n_layer * self.config.width * bytes_per_element

    def flops_per_picture(self, training: bool = True) -> float:
        return self.flops_per_token(training) * self.config.n_ctx

    def trunk(self, tokens_BN, masked_BN=None, each=None):
        """The residual stream after the last block, (B, N, d), before the final norm; `each` as in through_blocks."""
        dtype = self.stream_dtype()
        with without_autocast(tokens_BN):
            h = ops.embed(tokens_BN, self.wte, self.wpe, self.sos, masked_BN, dtype=dtype, impl=self.impl)
            return self.through_blocks(h, each)

    def forward(self, tokens_BN, masked_BN=None):
        """Logits (B, N, V): at position i over pixel i given the pixels before it (AR: start vector and shift are
        inside), or given all unmasked pixels (BERT; masked_BN bool or None)."""
        n = self.normed(self.trunk(tokens_BN, masked_BN), self.norm_f)
        with without_autocast(n):
            return ops.linear(n, self.head)

    def loss(self, tokens_BN, masked_BN=None, generator: torch.Generator | None = None):
        """Nats a pixel, a scalar (paper section 2.1, [code]).

        AR: mean cross-entropy of all B N pixels. BERT: each picture's mean over its masked pixels (0 if it has none),
        then the mean over pictures; masked_BN defaults to independent draws with probability 0.15."""
        if tokens_BN.shape[:1] == (0,):
            raise ValueError("tokens_BN: got no pictures, expected at least one: the loss is a mean")
        if self.config.causal and masked_BN is not None:
            raise ValueError("masked_BN: got a mask, expected None for objective 'ar'")
        if not self.config.causal and masked_BN is None:
            masked_BN = self.draw_mask(tokens_BN, generator)
        return self.mean_loss(self.nll(self.trunk(tokens_BN, masked_BN), tokens_BN), masked_BN)

    @staticmethod
    def mean_loss(nll_BN, masked_BN=None):
        """The loss, a scalar, from each pixel's nats: over all pixels (AR), or over the masked ones (BERT)."""
        if masked_BN is None:
            return nll_BN.mean()
        return ((nll_BN * masked_BN).sum(-1) / masked_BN.sum(-1).clamp(min=1)).mean()

    def nll(self, h_BNd, targets_BN):
        """Nats of each target, (B, N), from the trunk's output."""
        c = self.config
        with without_autocast(h_BNd):
            return ops.head_loss(
                h_BNd, self.norm_f, self.head, targets_BN,
                eps=c.norm_eps, centred=c.centred, impl=self.impl,
            )  # fmt: skip

    @staticmethod
    def draw_mask(tokens_BN, generator: torch.Generator | None = None):
        """BERT's mask, bool (B, N): each position alone with probability 0.15."""
        return torch.rand(tokens_BN.shape, device=tokens_BN.device, generator=generator) < MASK_PROBABILITY

    def features(self, tokens_BN, masked_BN=None):
        """The linear probe's features of every layer, fp32 or wider, (L + 1, B, d): block l's first norm applied to
        its input, mean over positions; the last one is the final norm's output (paper section 2.4, [code])."""
        pooled = []
        h = self.trunk(tokens_BN, masked_BN, each=lambda h, gain: pooled.append(self.pool(h, gain)))
        return torch.stack([*pooled, self.pool(h, self.norm_f)])

    def pool(self, h_BNd, gain):
        """Mean over positions of norm(h), (B, d), in fp32 or wider."""
        n = self.normed(h_BNd, gain)
        return n.mean(1, dtype=torch.promote_types(n.dtype, torch.float32))

    def classify(self, h_BNd):
        """Class logits (B, classes) from the trunk's output: wclf on the mean-pooled final features."""
        if self.classifier is None:
            raise ValueError("classes: got 0 in this model's config, expected a model with a classifier (classes > 0)")
        pooled = self.pool(h_BNd, self.norm_f)
        return F.linear(pooled, self.classifier.to(pooled.dtype))

    def generate(self, batch: int = 1, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0, **options):
        """Sample whole pictures: tokens (batch, n_ctx). Options as in igpt.sample.generate."""
        return sample.generate(self, batch, temperature=temperature, top_k=top_k, seed=seed, **options)

    def complete(self, tokens_BN, keep: int, *, temperature: float = 1.0, top_k=None, seed: int = 0, **options):
        """Keep the first `keep` pixels of each picture and sample the rest: tokens (B, n_ctx)."""
        return sample.complete(self, tokens_BN, keep, temperature=temperature, top_k=top_k, seed=seed, **options)

"""ViT: a transformer over patches of a picture (Dosovitskiy et al. 2021), of Image GPT's blocks.

    model = ViT.from_preset("vit-b16")
    logits = model(pixels)               # uint8 (B, 224, 224, 3) -> (B, 1000)
    loss = model.loss(pixels, labels)    # nats a picture

What differs from model.py's: patches for pixels, a class token, full attention, layer norms with biases, biases on all
products, exact gelu. Shape suffixes: B batch, S side in pixels, P patches, N = 1 + P positions, d width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from igpt import ops
from igpt.config import VITS, ViTConfig
from igpt.kernels import checks
from igpt.kernels.reference import wide
from igpt.model import Transformer, without_autocast

MASKED, SWAPPED = 0.8, 0.1  # of the corrupted patches; the rest stay as they are (paper B.1.2)


class ViT(Transformer):
    """The model. Pixels are uint8, or floats in [-1, 1], (B, S, S, 3). Raises ValueError for others."""

    config_class, sizes = ViTConfig, VITS
    entered_by = ("loss", "predict")

    def make_ends(self, config: ViTConfig) -> None:
        d = config.width
        self.patch = nn.Parameter(torch.empty(d, 3 * config.patch**2))  # of a patch's pixels, row by row, r g b each
        self.b_patch = nn.Parameter(torch.empty(d))
        self.cls = nn.Parameter(torch.empty(d))
        self.mask = nn.Parameter(torch.empty(d)) if config.objective == "patches" else None
        self.wpe = nn.Parameter(torch.empty(1 + config.side**2, d))
        self.norm_f = nn.Parameter(torch.empty(d))
        self.b_norm_f = nn.Parameter(torch.empty(d))
        self.pooler = nn.Parameter(torch.empty(d, d)) if config.pooler else None
        self.b_pooler = nn.Parameter(torch.empty(d)) if config.pooler else None
        self.head = nn.Parameter(torch.empty(config.outputs, d)) if config.outputs else None
        self.b_head = nn.Parameter(torch.empty(config.outputs)) if config.outputs else None

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew. All normal with mean 0 and standard deviation (the authors' code; theirs are in part
        uniform of the same deviation):

        patch     1 / sqrt(3 p^2)    attention q, k, v, output; pooler    1 / sqrt(d)
        wpe       0.02               MLP fc, proj                         sqrt(2 / (d + inner))
        mask      0.02               head, class token, biases            0 (zeros)

        Norm gains are 1. The zero head makes the first loss exactly ln of the classes."""
        c = self.config
        attention, mlp = c.width**-0.5, (2 / (c.width + c.inner)) ** 0.5
        std = {
            "patch": (3 * c.patch**2) ** -0.5, "wpe": 0.02, "mask": 0.02, "pooler": attention,
            "attn.qkv": attention, "attn.proj": attention, "mlp.fc": mlp, "mlp.proj": mlp,
        }  # fmt: skip
        self.draw(std, generator)

    def flops_per_picture(self, training: bool = True) -> float:
        """FLOPs of a picture: 2 for each weight of a product, and attention's two products; times 3 in training."""
        c, P = self.config, self.config.side**2
        heads = P if c.objective == "patches" else 1
        products = (1 + P) * c.n_layer * (4 * c.width**2 + 2 * c.width * c.inner)
        products += P * self.patch.numel() + heads * c.outputs * c.width
        forward = 2 * products + c.n_layer * 4 * (1 + P) ** 2 * c.width
        return 3 * forward if training else forward

    def patches(self, pixels_BSS3):
        """(B, P, 3 p^2): each patch's pixels, row by row, as they came."""
        c = self.config
        is_right = pixels_BSS3.dtype == torch.uint8 or pixels_BSS3.is_floating_point()
        if not is_right or pixels_BSS3.shape[1:] != (c.size, c.size, 3):
            checks.refuse("ViT", "pixels", checks.said(pixels_BSS3), f"uint8 or floats (B, {c.size}, {c.size}, 3)")
        return rearrange(pixels_BSS3, "b (y p) (x q) c -> b (y x) (p q c)", p=c.patch, q=c.patch)

    def colours(self, patches_BPC):
        """The class of each patch's mean colour, 3 bits a channel, int64 (B, P) in [0, 512)."""
        rgb = patches_BPC.unflatten(-1, (-1, 3))
        mean = (rgb.float() if rgb.dtype == torch.uint8 else (rgb.float() + 1) * 127.5).mean(-2)
        levels = (mean / 32).long().clamp(0, 7)
        return levels[..., 0] * 64 + levels[..., 1] * 8 + levels[..., 2]

    def draw_corruption(self, B: int, generator: torch.Generator | None = None):
        """(sources int64 (B, P), corrupted int64 (B, P // 2)): half of each picture's patches, and what then stands in
        each place: 80% the mask token (P), 10% another patch of the picture, 10% the same."""
        P = self.config.side**2
        drawn = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        corrupted = torch.rand(B, P, **drawn).argsort(1)[:, : P // 2]
        kind = torch.rand(corrupted.shape, **drawn)
        other = (corrupted + torch.randint(1, P, corrupted.shape, **drawn)) % P
        chosen = torch.where(kind < MASKED, P, torch.where(kind < MASKED + SWAPPED, other, corrupted))
        return torch.arange(P, device=corrupted.device).repeat(B, 1).scatter(1, corrupted, chosen), corrupted

    def embed(self, patches_BPC, sources_BP, dtype: torch.dtype):
        """Class token and patches at their positions, (B, N, d)."""
        x = patches_BPC / 127.5 - 1 if patches_BPC.dtype == torch.uint8 else patches_BPC
        if sources_BP is not None:
            # Pixels are moved, not embeddings: their gradient would be a sum in no order.
            x = x.gather(1, sources_BP.clamp(max=x.shape[1] - 1)[..., None].expand_as(x))
        h = ops.linear(x.to(dtype), self.patch, self.b_patch)
        if sources_BP is not None:
            h = torch.where((sources_BP == x.shape[1])[..., None], self.mask.to(dtype), h)
        return torch.cat([self.cls.to(dtype).expand(len(h), 1, -1), h], 1) + self.wpe.to(dtype)

    def trunk(self, patches_BPC, sources_BP=None):
        """The residual stream after the last block, (B, N, d), before the final norm, from `patches`."""
        dtype = self.stream_dtype()
        with without_autocast(patches_BPC):
            return self.through_blocks(self.embed(patches_BPC, sources_BP, dtype))

    def outputs(self, h):
        """Final norm, pooler and head, where the model has them, of positions (..., d) of the stream."""
        with without_autocast(h):
            n = self.normed(h, self.norm_f) + self.b_norm_f.to(h.dtype)
            n = n if self.pooler is None else ops.linear(n, self.pooler, self.b_pooler).tanh()
            return n if self.head is None else ops.linear(n, self.head, self.b_head)

    def forward(self, pixels_BSS3):
        """Class logits (B, classes), or without a head the class token's features (B, d); objective "patches": logits
        of each patch's mean colour, (B, P, 512)."""
        h = self.trunk(self.patches(pixels_BSS3))
        return self.outputs(h[:, 1:] if self.config.objective == "patches" else h[:, 0])

    def loss(self, pixels_BSS3, *targets):
        """Nats a picture, a scalar: loss(pixels, labels (B,)). Objective "patches": nats a corrupted patch, of its mean
        colour, loss(pixels, sources, corrupted) of `draw_corruption`, which is asked where they are left out."""
        if self.config.outputs == 0 or not len(pixels_BSS3):
            raise ValueError(f"loss: got {len(pixels_BSS3)} pictures and {self.config.outputs} classes, expected some")
        logits, classes = self.predict(pixels_BSS3, *targets)
        return F.cross_entropy(wide(logits), classes)

    def predict(self, pixels_BSS3, *targets):
        """What `loss` compares, with its arguments: (logits (n, classes), classes int64 (n,)) of pictures, or of all
        corrupted patches."""
        patches, objective = self.patches(pixels_BSS3), self.config.objective
        if len(targets) not in ((1,) if objective == "labels" else (0, 2)):
            expected = "labels" if objective == "labels" else "sources and corrupted, or neither"
            raise ValueError(f"loss: got {len(targets)} targets for objective {objective!r}, expected {expected}")
        if objective == "labels":
            (labels,) = targets
            checks.integers("loss", "labels", labels, self.config.classes)
            return self.outputs(self.trunk(patches)[:, 0]), labels.long()
        sources, corrupted = targets or (t.to(patches.device) for t in self.draw_corruption(len(patches)))
        h = self.trunk(patches, sources)[:, 1:]
        logits = self.outputs(h.gather(1, corrupted[..., None].expand(-1, -1, h.shape[-1])))
        return logits.flatten(0, 1), self.colours(patches).gather(1, corrupted).flatten()

"""ViT against Hugging Face's of the same size, on the same pictures: logits, and training steps by labels."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

import igpt
from bench import cost
from bench.cases import DTYPES, Case, Timed
from bench.rows import Row
from bench.speed import measure
from bench.speed.measure import Run
from bench.speed.pictures import pictures
from igpt import ViT
from igpt.config import VITS, ViTConfig
from igpt.data import resize_all

NOTES = {"ours": "", "hugging face": "ViTForImageClassification with its SDPA attention"}


@dataclass(frozen=True)
class ViTCase(Timed):
    """A named ViT at B pictures: "fwd" is logits, "step" loss, gradients and Adam."""

    preset: str
    B: int
    dtype: str
    direction: str
    op, unit, is_whole = "vit", "pictures", True

    @property
    def config(self) -> ViTConfig:
        return VITS[self.preset]

    @property
    def labels(self) -> dict:
        c = self.config
        shape = {"N": 1 + c.side**2, "H": c.heads, "D": c.head_dim, "d": c.width, "causal": False}
        return shape | {n: getattr(self, n) for n in ("op", "preset", "B", "dtype", "direction")}

    @property
    def needs(self) -> list[tuple[str, str]]:
        return list(itertools.product(("attention", "norm", "norm_linear", "norm_mlp"), [self.dtype]))

    @property
    def rate(self) -> int:
        return self.B

    def cost(self) -> cost.Cost:
        """Of the blocks and the patches' product; the head's one row a picture is left out."""
        c, e, direction = self.config, cost.ELEMENT[self.dtype], "fwd" if self.direction == "fwd" else "fwd+bwd"

        def part(N: int, H: int, D: int) -> Case:
            return Case("", self.B, N, H, D, self.dtype, False, direction)

        b = part(1 + c.side**2, c.heads, c.head_dim)
        layer = cost.norm_linear(b, e) + cost.attention(b, e) + cost.linear(b, e, c.width) + cost.norm_mlp(b, e)
        return c.n_layer * layer + cost.linear(part(c.side**2, 1, 3 * c.patch**2), e, c.width)

    def useful(self) -> float:
        return self.B * ViT(self.config, device="meta").flops_per_picture(training=self.direction != "fwd")


def build(name: str, case: ViTCase, device: str) -> Callable[[], object]:
    """The timed call of one implementation."""
    c, dtype = case.config, DTYPES[case.dtype]
    pixels = torch.from_numpy(resize_all(pictures(case.B), c.size)).to(device)
    labels = torch.arange(case.B, device=device) % c.classes
    torch.manual_seed(0)
    if name == "ours":
        model = ViT(c, device=device, dtype=dtype)
        torch.nn.init.normal_(model.head, std=0.02)
        forward, loss = functools.partial(model, pixels), functools.partial(model.loss, pixels, labels)
    else:
        from transformers import ViTConfig as TheirConfig
        from transformers import ViTForImageClassification

        sizes = {"hidden_size": c.width, "num_hidden_layers": c.n_layer, "num_attention_heads": c.heads}
        model = ViTForImageClassification(TheirConfig(
            **sizes, intermediate_size=c.inner, image_size=c.size, patch_size=c.patch, num_labels=c.classes,
        )).to(device, dtype)  # fmt: skip
        planes = (pixels / 127.5 - 1).to(dtype).permute(0, 3, 1, 2).contiguous()
        forward, loss = functools.partial(model, planes), lambda: model(planes, labels=labels).loss
    if case.direction == "fwd":
        return torch.no_grad()(forward)
    on_gpu = device == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), fused=on_gpu, capturable=on_gpu)
    if on_gpu and name == "ours":
        replay = igpt.graphed(model.loss, optimizer)
        for _ in range(3):  # two steps as they are, and the capture
            replay(pixels, labels)
        return lambda: replay(pixels, labels)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def cases(device: str, dtypes: Iterable[str]) -> list[ViTCase]:
    """A batch and a step of B on a GPU; on a CPU a picture of B, and a step of tiny."""
    sizes = [("vit-b16", 128, "fwd"), ("vit-b16", 128, "step")]
    if device == "cpu":
        sizes = [("vit-b16", 1, "fwd"), ("vit-tiny", 64, "step")]
    return [ViTCase(name, B, dtype, direction) for name, B, direction in sizes for dtype in dtypes]


def rows(chosen: Iterable[ViTCase], run: Run) -> Iterator[Row]:
    """Rows of both implementations; cases that differ in dtype alone are timed together."""
    groups = itertools.groupby(chosen, lambda case: (case.preset, case.B, case.direction))
    grouped = [[(name, case) for case in group for name in NOTES] for _, group in groups]
    return measure.rows("model", grouped, build, NOTES, run, run.step_timer)

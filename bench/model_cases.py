"""Whole models as cases: presets in training, and decoding."""

import itertools
from dataclasses import dataclass, replace

from bench import cost
from bench.cases import ROW_OPS, Timed
from igpt import ImageGPT
from igpt.config import PRESETS


@dataclass(frozen=True)
class ModelCase(Timed):
    """A whole preset at B pictures of N positions: "fwd" is logits, "fwd+bwd" the loss with every gradient, "step" that
    and the optimiser."""

    preset: str
    B: int
    N: int
    dtype: str
    direction: str
    op, unit, is_whole = "model", "tokens", True

    @property
    def labels(self) -> dict:
        c = PRESETS[self.preset]
        shape = {"H": c.heads, "D": c.head_dim, "d": c.width, "causal": c.causal}
        return shape | {n: getattr(self, n) for n in ("op", "preset", "B", "N", "dtype", "direction")}

    @property
    def rate(self) -> int:
        return self.B * self.N

    @property
    def needs(self) -> list[tuple[str, str]]:
        return list(itertools.product(("model", "attention", *ROW_OPS), [self.dtype]))

    def cost(self) -> cost.Cost:
        e, config = cost.ELEMENT[self.dtype], PRESETS[self.preset]
        if self.direction == "fwd":
            return cost.logits(config, self.B, self.N, e)
        return cost.model(config, self.B, self.N, e, "fwd+bwd")

    def useful(self) -> float:
        """The model's own FLOPs, recomputation left out."""
        model = ImageGPT(replace(PRESETS[self.preset], n_ctx=self.N), device="meta")
        return model.flops_per_token(training=self.direction != "fwd") * self.rate


@dataclass(frozen=True)
class DecodeCase(ModelCase):
    """B pictures of a preset, positions N - steps .. N - 1. dtype: of the weights. cached: bytes of the cache's
    elements, 2 on a GPU, where the cache has the activations' dtype."""

    direction: str = "token"
    steps: int = 64
    cached: int = 2
    op, is_whole = "decode", False

    @property
    def start(self) -> int:
        return self.N - self.steps

    @property
    def activations(self) -> str:
        return "bf16" if self.dtype == "int8" else self.dtype

    @property
    def model(self) -> ModelCase:
        """What decodes."""
        return ModelCase(self.preset, self.B, PRESETS[self.preset].n_ctx, self.activations, "fwd")

    @property
    def needs(self) -> list[tuple[str, str]]:
        return [(self.op, self.activations)]

    @property
    def share(self) -> float:
        return 1 / self.steps

    @property
    def rate(self) -> float:
        return self.B / PRESETS[self.preset].n_ctx

    @property
    def unit(self) -> str:
        """The start of a picture says nothing about a whole one."""
        return "pictures" if self.start or self.steps == PRESETS[self.preset].n_ctx else ""

    def cost(self) -> cost.Cost:
        """One step's compulsory bytes and FLOPs: every weight of a product once, the keys and values so far once, on
        average over the window."""
        c, keys, e = PRESETS[self.preset], (self.start + self.N + 1) / 2, cost.ELEMENT[self.activations]
        weights = c.n_layer * (4 * c.width**2 + 2 * c.width * c.inner)
        head = c.vocab * c.width
        kv = 2 * c.n_layer * self.B * keys * c.width
        stored = 1 if self.dtype == "int8" else e
        return cost.Cost(2 * self.B * (weights + head) + 2 * kv, weights * stored + head * e + kv * self.cached)

    def useful(self) -> None:
        return None

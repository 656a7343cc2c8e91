"""The model's configuration: one frozen dataclass, and the paper's sizes as one-line presets."""

import sys
from dataclasses import asdict, dataclass, fields, replace

OBJECTIVES = ("ar", "bert")
NORMS = ("rms", "layer")


@dataclass(frozen=True)
class Config:
    """An Image GPT (SPEC: paper section 2 and OpenAI's src/model.py).

    n_layer, width d, heads; n_ctx pixels (1024 = 32x32); vocab palette colours (512); objective "ar" or "bert";
    norm "rms" (released: not centred) or "layer" (centred, as the paper writes); n_inner MLP width (default 4 d);
    bias: biases on the four projections (never in the paper; some Hugging Face checkpoints trained them);
    attn_scale: None is 1/sqrt(head dim); scale_by_layer divides it by layer + 1 (a Hugging Face option);
    classes > 0 adds a classifier head wclf on the mean-pooled final features.
    Raises ValueError naming the field if a value makes no model."""

    n_layer: int
    width: int
    heads: int
    n_ctx: int = 1024
    vocab: int = 512
    objective: str = "ar"
    norm: str = "rms"
    norm_eps: float = 1e-5
    n_inner: int | None = None
    bias: bool = False
    attn_scale: float | None = None
    scale_by_layer: bool = False
    classes: int = 0

    def __post_init__(self):
        for name in ("n_layer", "width", "heads", "n_ctx", "vocab"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r:.80}, expected a positive integer")
        for name in ("bias", "scale_by_layer"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: got {getattr(self, name)!r:.80}, expected True or False")
        if self.width % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of width {self.width}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: got {self.objective!r:.80}, expected one of {OBJECTIVES}")
        if self.norm not in NORMS:
            raise ValueError(f"norm: got {self.norm!r:.80}, expected one of {NORMS}")
        if type(self.classes) is not int or self.classes < 0:
            raise ValueError(f"classes: got {self.classes!r:.80}, expected 0 (no classifier) or more")
        if self.n_inner is not None and (type(self.n_inner) is not int or self.n_inner < 1):
            raise ValueError(f"n_inner: got {self.n_inner!r:.80}, expected None (4 * width) or a positive integer")
        if not _positive(self.norm_eps):
            raise ValueError(f"norm_eps: got {self.norm_eps!r:.80}, expected a positive number")
        if self.attn_scale is not None and not _positive(self.attn_scale):
            raise ValueError(f"attn_scale: got {self.attn_scale!r:.80}, expected None or a positive number")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        return 4 * self.width if self.n_inner is None else self.n_inner

    @property
    def causal(self) -> bool:
        return self.objective == "ar"

    @property
    def centred(self) -> bool:
        return self.norm == "layer"

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Raises ValueError naming any unknown or missing key."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown keys {unknown}, expected some of {sorted(known)}")
        if missing := sorted({"n_layer", "width", "heads"} - set(values)):
            raise ValueError(f"config: missing keys {missing}")
        return cls(**values)


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


PRESETS = {
    "tiny": Config(n_layer=4, width=128, heads=2),
    "s": Config(n_layer=24, width=512, heads=8),
    "m": Config(n_layer=36, width=1024, heads=8),
    "l": Config(n_layer=48, width=1536, heads=16),
    "xl": Config(n_layer=60, width=3072, heads=24),
}


def preset(name: str, **overrides) -> Config:
    """A named size with fields replaced: preset("m", n_ctx=2304). Raises ValueError for an unknown name or field."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {sorted(PRESETS)}")
    known = {f.name for f in fields(Config)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"preset: unknown fields {unknown}, expected some of {sorted(known)}")
    return replace(PRESETS[name], **overrides)

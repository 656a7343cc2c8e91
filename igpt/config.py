"""The models' configurations: a frozen dataclass each, and the papers' sizes as one-line presets."""

import sys
from dataclasses import MISSING, asdict, dataclass, fields, replace

OBJECTIVES = ("ar", "bert")
VIT_OBJECTIVES = ("labels", "patches")
NORMS = ("rms", "layer")
PATCH_COLOURS = 512  # of a patch's mean colour, 3 bits a channel


@dataclass(frozen=True)
class Blocks:
    """What every transformer has: n_layer blocks of width d with `heads` heads."""

    n_layer: int
    width: int
    heads: int

    def require_sizes(self, *names: str) -> None:
        """Raises ValueError naming the field that makes no blocks; `names`: further positive integers."""
        for name in ("n_layer", "width", "heads", *names):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: got {value!r:.80}, expected a positive integer")
        if self.width % self.heads:
            raise ValueError(f"heads: got {self.heads}, expected a divisor of width {self.width}")
        if type(self.classes) is not int or self.classes < 0:
            raise ValueError(f"classes: got {self.classes!r:.80}, expected 0 (no classifier) or more")
        if self.n_inner is not None and (type(self.n_inner) is not int or self.n_inner < 1):
            raise ValueError(f"n_inner: got {self.n_inner!r:.80}, expected None (4 * width) or a positive integer")
        if not _positive(self.norm_eps):
            raise ValueError(f"norm_eps: got {self.norm_eps!r:.80}, expected a positive number")

    def require_flags(self, *names: str) -> None:
        for name in names:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: got {getattr(self, name)!r:.80}, expected True or False")

    def require_choice(self, name: str, choices: tuple) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}: got {getattr(self, name)!r:.80}, expected one of {choices}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def inner(self) -> int:
        return 4 * self.width if self.n_inner is None else self.n_inner

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Blocks":
        """Raises ValueError naming any unknown or missing key."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config: unknown keys {unknown}, expected some of {sorted(known)}")
        if missing := sorted({f.name for f in fields(cls) if f.default is MISSING} - set(values)):
            raise ValueError(f"config: missing keys {missing}")
        return cls(**values)


@dataclass(frozen=True)
class Config(Blocks):
    """An Image GPT (SPEC: paper section 2 and OpenAI's src/model.py).

    n_layer, width d, heads; n_ctx pixels (1024 = 32x32); vocab palette colours (512); objective "ar" or "bert";
    norm "rms" (released: not centred) or "layer" (centred, as the paper writes); n_inner MLP width (default 4 d);
    bias: biases on the four projections (never in the paper; some Hugging Face checkpoints trained them);
    attn_scale: None is 1/sqrt(head dim); scale_by_layer divides it by layer + 1 (a Hugging Face option);
    classes > 0 adds a classifier head wclf on the mean-pooled final features.
    Raises ValueError naming the field if a value makes no model."""

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

    norm_bias, activation = False, "quick_gelu"

    def __post_init__(self):
        self.require_sizes("n_ctx", "vocab")
        self.require_flags("bias", "scale_by_layer")
        self.require_choice("objective", OBJECTIVES)
        self.require_choice("norm", NORMS)
        if self.attn_scale is not None and not _positive(self.attn_scale):
            raise ValueError(f"attn_scale: got {self.attn_scale!r:.80}, expected None or a positive number")

    @property
    def causal(self) -> bool:
        return self.objective == "ar"

    @property
    def centred(self) -> bool:
        return self.norm == "layer"


@dataclass(frozen=True)
class ViTConfig(Blocks):
    """A vision transformer (Dosovitskiy et al. 2021).

    n_layer, width d, heads; pictures of size x size pixels in patches of patch x patch; objective "labels": `classes`
    logits from the class token (0: its features), or "patches": the mean colour of each corrupted patch; n_inner MLP
    width (default 4 d); pooler: a tanh layer before the head, as the paper pretrains (Hugging Face's ViTModel has it).
    Raises ValueError naming the field if a value makes no model."""

    size: int = 224
    patch: int = 16
    objective: str = "labels"
    classes: int = 1000
    n_inner: int | None = None
    norm_eps: float = 1e-6
    pooler: bool = False

    bias, norm_bias, centred, causal, activation = True, True, True, False, "gelu"
    attn_scale, scale_by_layer = None, False

    def __post_init__(self):
        self.require_sizes("size", "patch")
        self.require_choice("objective", VIT_OBJECTIVES)
        self.require_flags("pooler")
        if self.size % self.patch:
            raise ValueError(f"size: got {self.size}, expected a multiple of the patch's {self.patch}")
        if self.pooler and self.objective == "patches":
            raise ValueError("pooler: got True, expected False for objective 'patches', which has no class")
        if self.side == 1 and self.objective == "patches":
            raise ValueError(f"patch: got {self.patch}, expected at most half of size {self.size}")

    @property
    def side(self) -> int:
        """Patches in a row."""
        return self.size // self.patch

    @property
    def outputs(self) -> int:
        """Rows of the head; 0: none."""
        return PATCH_COLOURS if self.objective == "patches" else self.classes


def _positive(value) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


PRESETS = {
    "tiny": Config(n_layer=4, width=128, heads=2),
    "s": Config(n_layer=24, width=512, heads=8),
    "m": Config(n_layer=36, width=1024, heads=8),
    "l": Config(n_layer=48, width=1536, heads=16),
    "xl": Config(n_layer=60, width=3072, heads=24),
}


VITS = {  # tiny is ours, for pictures of 32 x 32; S is Touvron et al. 2021's
    "vit-tiny": ViTConfig(n_layer=6, width=128, heads=2, size=32, patch=4),
    "vit-s16": ViTConfig(n_layer=12, width=384, heads=6),
    "vit-b16": ViTConfig(n_layer=12, width=768, heads=12),
    "vit-l16": ViTConfig(n_layer=24, width=1024, heads=16),
}


def preset(name: str, sizes: dict = PRESETS, /, **overrides) -> Config | ViTConfig:
    """One of the named `sizes` with fields replaced: preset("m", n_ctx=2304), preset("vit-b16", VITS, classes=10).
    Raises ValueError for an unknown name or field."""
    if name not in sizes:
        raise ValueError(f"preset: got {name!r}, expected one of {sorted(sizes)}")
    known = {f.name for f in fields(sizes[name])}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"preset: unknown fields {unknown}, expected some of {sorted(known)}")
    return replace(sizes[name], **overrides)

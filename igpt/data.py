"""Picture sets under one roof: `load(spec, split)` gives pictures or tokens with their labels."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .palette import Palette

ASSETS = Path(__file__).with_name("assets")


@dataclass(frozen=True)
class Pictures:
    """One split of a picture set: `images` uint8 (N, H, W, 3), or `tokens` uint16 (N, H*W), or both.

    labels int64 (N,) or None, with the names of the classes; `palette` is the set's own, where it has one."""

    name: str
    size: tuple[int, int]
    images: np.ndarray | None = None
    tokens: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    palette: Palette | None = None

    def __len__(self) -> int:
        return len(self.tokens if self.images is None else self.images)

    @property
    def n_ctx(self) -> int:
        return self.size[0] * self.size[1]

    def rows(self, index) -> "Pictures":
        """The pictures that `index` (slice, mask or integer array) picks."""
        picked = {k: v[index] for k in ("images", "tokens", "labels") if (v := getattr(self, k)) is not None}
        return replace(self, **picked)


def load(spec: str, split: str = "train", labels: str | None = None) -> Pictures:
    """The pictures of `spec`: "builtin:emoji".

    split "train", "valid", "test" or "train+valid"; labels "group" (9, the default) or "subgroup" (99)."""
    if spec != "builtin:emoji":
        raise ValueError(f"spec: got {spec!r}, expected 'builtin:emoji'")
    labels = "group" if labels is None else labels
    if labels not in ("group", "subgroup"):
        raise ValueError(f"labels: got {labels!r}, expected 'group' or 'subgroup'")
    with np.load(ASSETS / "emoji.npz", allow_pickle=False) as emoji:
        arrays = {name: emoji[name] for name in emoji.files}
    wanted = [list(arrays["splits"]).index(s) for s in split.split("+") if s in arrays["splits"]]
    if len(wanted) != len(split.split("+")):
        raise ValueError(f"split: got {split!r}, expected 'train', 'valid', 'test' or 'train+valid'")
    chosen = np.isin(arrays["split"], wanted)
    return Pictures(
        name=f"{spec}/{split}",
        size=(32, 32),
        images=arrays["images"][chosen],
        labels=arrays[labels][chosen].astype(np.int64),
        classes=tuple(map(str, arrays[f"{labels}s"])),
        palette=Palette.load(ASSETS / "emoji_palette.npy"),
    )

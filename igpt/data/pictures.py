"""Pictures: one split of a picture set in memory, and Rows: part of a memory map without copying it."""

from dataclasses import dataclass, replace

import numpy as np

from igpt.palette import Palette


class Rows:
    """The rows `index` of an array that may be a memory map: read when indexed, never copied as a whole."""

    def __init__(self, base: np.ndarray, index: np.ndarray):
        self.base, self.index = base, index
        self.shape, self.dtype, self.ndim = (len(index), *base.shape[1:]), base.dtype, base.ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index) -> np.ndarray:
        return np.asarray(self.base[self.index[index]])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


@dataclass(frozen=True)
class Pictures:
    """One split of a picture set: `images` uint8 (N, H, W, 3), or `tokens` uint16 (N, H*W), or both.

    name: where it is from, for messages; size: (H, W); labels: int64 (N,) or None, indices into classes;
    palette: the one that made the tokens, or the set's own, where it has one; vocab: colours that tokens count to;
    skipped: unreadable files that were left out; unlabelled: why there are no labels, where that can be said.
    tokens may be a memory map or Rows of one: index them, `tokens[batch]`, to get an array."""

    name: str
    size: tuple[int, int]
    images: np.ndarray | None = None
    tokens: np.ndarray | Rows | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    palette: Palette | None = None
    vocab: int | None = None
    skipped: tuple[str, ...] = ()
    unlabelled: str = ""

    def __post_init__(self):
        for field in ("images", "tokens", "labels"):
            if (array := getattr(self, field)) is not None and len(array) != len(self):
                raise ValueError(f"{self.name}: got {len(array)} {field}, expected {len(self)}, one a picture")
        if self.labels is not None and len(self):
            low, high = self.labels.min(), self.labels.max()
            if low < 0 or high >= len(self.classes):
                raise ValueError(f"{self.name}: got labels from {low} to {high}, expected 0 to {len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.tokens if self.images is None else self.images)

    @property
    def n_ctx(self) -> int:
        return self.size[0] * self.size[1]

    def rows(self, index) -> "Pictures":
        """The pictures that `index` (slice, mask or integer array) picks; memory maps stay on disk."""
        index = np.arange(len(self))[index]
        picked = {}
        for field in ("images", "tokens", "labels"):
            array = getattr(self, field)
            if isinstance(array, Rows):
                picked[field] = Rows(array.base, array.index[index])
            elif isinstance(array, np.memmap):
                picked[field] = Rows(array, index)
            elif array is not None:
                picked[field] = array[index]
        return replace(self, **picked)

    def encoded(self, palette: Palette | None = None) -> "Pictures":
        """With tokens of this palette (default: the set's own). Raises ValueError if there is none, or if there are
        only tokens, of another palette."""
        palette = self.palette if palette is None else palette
        if self.images is None:
            if palette is not None and self.palette is not None and palette != self.palette:
                raise ValueError(f"palette: got {palette}, but {self.name} holds tokens of {self.palette}")
            if palette is not None:
                palette.require(self.vocab)
            return self
        if palette is None:
            raise ValueError(f"palette: {self.name} has none of its own; expected one, e.g. Palette.fit(images)")
        tokens = palette.table(self.images).reshape(len(self), self.n_ctx)
        return replace(self, tokens=tokens, palette=palette, vocab=len(palette))

    def labelled(self) -> "Pictures":
        """Itself, or ValueError if it has no labels."""
        if self.labels is None:
            raise ValueError(f"{self.name}: labels are missing" + f": {self.unlabelled}" * bool(self.unlabelled))
        return self


def same_classes(train: Pictures, test: Pictures) -> None:
    """Raises ValueError, naming the difference, unless both sets are labelled by the same classes in one order."""
    ours, theirs = train.labelled().classes, test.labelled().classes
    if ours != theirs:
        only = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        raise ValueError(
            f"classes differ: only in {train.name} {only[0]}, only in {test.name} {only[1]}; expected the same, in one "
            "order"
        )


def joined(name: str, parts: list[Pictures]) -> Pictures:
    """Parts of one set, one after the other: the held-out part folded back."""
    if len(parts) == 1:
        return replace(parts[0], name=name)
    unlabelled = next((part.unlabelled for part in parts if part.labels is None), None)
    fields = ["images", "tokens"]
    if unlabelled is None:
        fields.append("labels")
        for part in parts:
            same_classes(parts[0], part)
    arrays = {
        field: np.concatenate([np.asarray(getattr(part, field)) for part in parts])
        for field in fields
        if getattr(parts[0], field) is not None
    }
    skipped = tuple(name for part in parts for name in part.skipped)
    whole = {"labels": None, "unlabelled": unlabelled or "", "skipped": skipped, **arrays}
    return replace(parts[0], name=name, **whole)

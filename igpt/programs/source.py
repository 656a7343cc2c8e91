"""What every measuring program starts from: a model and a labelled picture set as tokens."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from igpt import convert, data
from igpt.machine import device_of
from igpt.model import ImageGPT
from igpt.palette import Palette


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """Which checkpoint is meant where the model is a run directory."""

    step: int | None = None  # of a run: its checkpoint of this step; default: the best by validation loss
    last: bool = False  # of a run: its last checkpoint

    kinds = (ImageGPT,)  # what the program takes

    @property
    def which(self) -> int | str | None:
        if self.last and self.step is not None:
            raise ValueError(f"last, step: got both, --last and --step {self.step}, expected one of them")
        return "last" if self.last else self.step

    def pretrained(self, source: str, device: str):
        """The model of a directory, a run, a hub id or a prefix, on "auto", "cpu" or "cuda"."""
        kind = self.kinds[0]
        if len(self.kinds) > 1:
            config = convert.open_checkpoint(source, self.which).config
            kind = next(kind for kind in self.kinds if kind.config_class is type(config))
        model = kind.from_pretrained(source, step=self.which, device=device_of(device))
        if model.trained:
            say(f"{source}: {model.trained}")
        return model


@cache
def say(text: str) -> None:
    """To people, once."""
    print(text, file=sys.stderr)


class Running(OfRun):
    """How a model runs, by options of these names: model, device, dtype, batch and seed."""

    def load_model(self, **overrides):
        """The model on its device; `overrides` replace Config fields that add parameters (classes)."""
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch: got {self.batch}, expected at least 1")
        model = self.pretrained(self.model, self.device)
        return with_config(model, **overrides) if overrides else model

    def autocast(self, model):
        """The context in which the model computes in `dtype`; parameters of 16 bits stay what they are."""
        device = model.device.type
        bf16 = self.dtype == "bf16" or (self.dtype == "auto" and device == "cuda")
        return torch.autocast(device, torch.bfloat16, enabled=bf16)

    def batches(self, model, tokens):
        """(slice, int64 tensor on the CPU) of at most `batch` rows each; tokens (n, n_ctx) may be a memory map."""
        size = (64 if model.device.type == "cuda" else 4) if self.batch is None else self.batch
        for start in range(0, len(tokens), size):
            rows = slice(start, min(start + size, len(tokens)))
            yield rows, torch.from_numpy(tokens[rows].astype(np.int64))

    @torch.no_grad()
    def probabilities(self, model, tokens) -> torch.Tensor:
        """Of each class, fp32 (n, classes) on the CPU. BERT inputs stay masked, as in fine-tuning, under a mask that is
        the same every time."""
        generator, found = torch.Generator().manual_seed(self.seed), []
        with tqdm(total=len(tokens), desc="classes", unit="picture", leave=False) as bar, self.autocast(model):
            for _, x in self.batches(model, tokens):
                masked = None if model.config.causal else model.draw_mask(x, generator).to(model.wte.device)
                found.append(model.classify(model.trunk(x.to(model.wte.device), masked)).float().softmax(-1).cpu())
                bar.update(len(x))
        return torch.cat(found)


@dataclass(frozen=True)
class Source(Running):
    """A pretrained model and a picture set."""

    model: str  # builtin:emoji, our directory, a run's, a Hugging Face directory or hub id, or an OpenAI prefix
    data: str  # builtin:emoji, a folder, a token set, CIFAR, STL-10, IDX or OpenAI's npy sets (igpt.data.load)
    labels: str | None = None  # which labels, where a set has several
    holdout: float = 0.1  # part of train that is valid, where the set has no valid of its own (paper's ImageNet: 0.04)
    palette: Path | None = None  # palette.npy, kmeans_centers.npy or a directory with one; default: the model's own
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # of the activations; auto: bf16 on a GPU, fp32 on a CPU
    batch: int | None = None  # pictures at once; default: 64 on a GPU, 4 on a CPU, whose caches hold no more
    seed: int = 0
    skip_bad: bool = False  # leave unreadable picture files out and count them; default: stop at the first

    def load_split(self, model, split: str, pick: Callable | None = None) -> data.Pictures:
        """The Pictures of `split`, or those that `pick` picks (igpt.data.load), with their tokens. Raises ValueError if
        they don't fit the model."""
        side = math.isqrt(model.config.n_ctx)
        pictures = data.load(
            self.data, split, size=side, labels=self.labels, holdout=self.holdout, skip_bad=self.skip_bad,
            workers=None, pick=pick,
        )  # fmt: skip
        if not len(pictures):
            raise ValueError(f"data: {pictures.name} has no pictures")
        if pictures.n_ctx != model.config.n_ctx:
            raise ValueError(f"data: got {pictures.n_ctx} pixels a picture, expected the model's {model.config.n_ctx}")
        palette = Palette.load(self.palette) if self.palette else model.palette
        if palette is None and pictures.images is not None:
            raise ValueError(f"palette: {self.model} came without one, expected --palette")
        pictures = pictures.encoded(palette)  # tokens of another palette are refused
        if pictures.vocab != model.config.vocab:
            raise ValueError(f"data: got tokens of {pictures.vocab} colours, expected the model's {model.config.vocab}")
        return pictures


@dataclass(frozen=True)
class Labelled(Source):
    """A Source whose labels are used, those of all pictures or of some, evenly spread over each split."""

    limit_train: int | None = None  # only so many pictures of train, and the same part of valid
    limit_test: int | None = None  # only so many pictures of test

    def load_labelled(self, model, *splits: str) -> list[data.Pictures]:
        """load_split of each split, the training set first; raises ValueError where labels are missing or the classes
        differ."""
        for name in ("limit_train", "limit_test"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name}: got {limit}, expected at least 1")
        part, sets = None, []
        for split in splits:

            def some(n, split=split):
                nonlocal part
                if part is None:  # the training set comes first
                    part = 1 if self.limit_train is None else min(1, self.limit_train / n)
                return spread(n, self.limit_test or n if split == "test" else max(1, round(part * n)))

            sets.append(self.load_split(model, split, some))
            data.same_classes(sets[0], sets[-1])
        return sets


def spread(n: int, k: int) -> np.ndarray:
    """min(k, n) of n rows, evenly apart: sets that are sorted by class keep every class."""
    return np.linspace(0, n - 1, min(k, n)).astype(np.int64)


def with_config(model, **overrides):
    """The same weights in a model whose Config differs by `overrides`; parameters it adds are freshly initialised."""
    config = replace(model.config, **overrides)
    other = ImageGPT(config, impl=model.impl, device=model.wte.device, dtype=model.wte.dtype)
    wanted = other.state_dict()
    fitting = {k: v for k, v in model.state_dict().items() if k in wanted and v.shape == wanted[k].shape}
    other.load_state_dict(fitting, strict=False)
    other.palette, other.class_names = model.palette, model.class_names
    return other


def bits(nats: float) -> float:
    return nats / math.log(2)

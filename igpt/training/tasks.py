"""What a run trains: a model, its pictures, and what of them is a batch. The loop knows no more than this.

    task = task_of(options, us, init)
    task.kind(task.config)                               # the model, whose weights task.fill draws or copies
    model.loss(*task.inputs(task.train, rows, seed, step), *task.draws(len(rows), seed, step))
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from igpt import data
from igpt.config import Blocks, ViTConfig
from igpt.convert import Checkpoint
from igpt.kernels.reference import wide
from igpt.model import MASK_PROBABILITY, ImageGPT
from igpt.training.pictures import pixels_of, tokens_of
from igpt.training.processes import Processes
from igpt.training.start import config_of, fill, vit_config_of
from igpt.vit import ViT


class Tokens:
    """Image GPT on pictures as tokens. Called by every process, as is Pixels."""

    kind, measures = ImageGPT, ("valid_loss",)

    def __init__(self, options, us: Processes, init: Checkpoint | None):
        self.train, self.valid = tokens_of(options, us, init)
        self.palette, self.classes = self.train.palette, ()
        self.config = config_of(options, init, self.train)
        self.fill = partial(fill, init=init, plane=self.train.size, seed=options.seed)

    def inputs(self, pictures: data.Pictures, rows: np.ndarray, *seed: int, mine=slice(None)) -> list[torch.Tensor]:
        """What of a batch's pictures the model takes, of those that are `mine`; `seed` of a training batch only."""
        return [torch.from_numpy(pictures.tokens[rows[mine]].astype(np.int64))]

    def draws(self, pictures: int, *seed: int) -> list[torch.Tensor]:
        """BERT's masks of a whole batch, the same however many processes share it; none for a causal model."""
        if self.config.causal:
            return []
        return [torch.rand(pictures, self.config.n_ctx, generator=generator_of(*seed)) < MASK_PROBABILITY]

    def measure(self, model: ImageGPT, *batch: torch.Tensor) -> torch.Tensor:
        """`measures` of a batch, means over its pictures."""
        return model.loss(*batch)[None]


class Pixels:
    """ViT on pictures as they are, with their labels or with their own colours as what is predicted."""

    kind, palette, measures = ViT, None, ("valid_loss", "valid_accuracy")

    def __init__(self, options, us: Processes, init: Checkpoint | None):
        self.train, self.valid = pixels_of(options, init)
        self.augment = options.augment
        self.config = vit_config_of(options, init, self.train)
        self.classes = self.train.classes if self.config.classes else ()
        known = init is not None and init.classes == self.classes and init.config.objective == self.config.objective
        # The paper's fine-tuning: a head of zeros for other classes (section 3.2).
        fresh, plane = () if known else ("head", "b_head"), (self.config.side,) * 2
        self.fill = partial(fill, init=init, plane=plane, seed=options.seed, fresh=fresh)
        self.corruption = ViT(self.config, device="meta").draw_corruption

    def inputs(self, pictures: data.Pictures, rows: np.ndarray, *seed: int, mine=slice(None)) -> list[torch.Tensor]:
        images = pictures.images[rows[mine]]
        if seed and self.augment:
            pad = self.config.size // 8  # of 32 pixels, CIFAR's 4
            drawn = data.shifts(len(rows), np.random.default_rng(seed), pad)
            images = data.shifted(images, pad, *(a[mine] for a in drawn))
        pixels = torch.from_numpy(np.ascontiguousarray(images))
        return [pixels, torch.from_numpy(pictures.labels[rows[mine]])] if self.config.classes else [pixels]

    def draws(self, pictures: int, *seed: int) -> list[torch.Tensor]:
        """Which patches of a whole batch are corrupted, and how; nothing where labels are predicted."""
        return [] if self.config.classes else list(self.corruption(pictures, generator_of(*seed)))

    def measure(self, model: ViT, *batch: torch.Tensor) -> torch.Tensor:
        logits, targets = model.predict(*batch)
        return torch.stack([F.cross_entropy(wide(logits), targets), (logits.argmax(-1) == targets).float().mean()])


def task_of(options, us: Processes, init: Checkpoint | None) -> Tokens | Pixels:
    return (Pixels if is_vit(options, init and init.config) else Tokens)(options, us, init)


def is_vit(options, init: Blocks | None) -> bool:
    """By --model, or by the model that the run starts from. Raises ValueError where these are of two kinds."""
    there = isinstance(init, ViTConfig)
    if options.model is not None and init is not None and not there:
        raise ValueError(f"model: got {options.model!r}, but {options.init} is an Image GPT, expected a ViT")
    return there or options.model is not None


def generator_of(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))

"""Probe features of a whole picture set, all layers in one pass, in a memory-mapped file."""

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from igpt.programs.source import Source


@torch.no_grad()
def extract(options: Source, model, tokens: np.ndarray, folder: Path | None = None, *, draw: int = 0):
    """Features fp32 (L + 1, n, d) of tokens (n, n_ctx), a numpy memmap of an unnamed file in `folder` (default: the
    system's temporary one). Raises OSError, before any work, if the disk has no room for them.

    A BERT model reads each picture under a mask drawn from (options.seed, draw), as in its pretraining."""
    c = model.config
    shape = (c.n_layer + 1, len(tokens), c.width)
    # The memmap outlives this function, and its file goes with it.
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
    if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map ends the process, without a word
        os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
    features = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + draw)
    with tqdm(total=len(tokens), desc="features", unit="picture", leave=False) as progress, options.autocast(model):
        for rows, x in options.batches(model, tokens):
            masked = None if c.causal else model.draw_mask(x, generator).to(model.wte.device)
            features[:, rows] = model.features(x.to(model.wte.device), masked).float().cpu().numpy()
            progress.update(len(x))
    return features


def layers(features: np.ndarray, chosen) -> torch.Tensor:
    """The features of one layer, or of several side by side: (n, d * len(chosen))."""
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    return torch.from_numpy(np.concatenate([features[layer] for layer in chosen], axis=1))

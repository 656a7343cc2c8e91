"""The program `igpt eval`: the generative loss, in the released code's convention."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt.programs.source import Source, bits


@dataclass(frozen=True)
class Options(Source):
    """Nats and bits a pixel. AR: the mean over pictures and all positions [code]; BERT: each picture's mean over its
    masked positions, then over pictures, inputs masked as in training."""

    split: str = "test"
    limit: int | None = None  # only this many pictures, the first ones


@torch.no_grad()
def run(options: Options) -> dict:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit: got {options.limit}, expected at least 1")
    model = options.load_model().eval()
    tokens = options.load_split(model, options.split, lambda n: slice(options.limit)).tokens
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    with tqdm(total=len(tokens), desc="eval", unit="picture") as progress, options.autocast(model):
        for _, x in options.batches(model, tokens):
            masked = None if model.config.causal else model.draw_mask(x, generator).to(model.wte.device)
            # A batch's loss is a mean over its pictures: weighted by their number, the whole set's mean.
            losses.append((float(model.loss(x.to(model.wte.device), masked)), len(x)))
            progress.update(len(x))
    nats = float(np.average([loss for loss, _ in losses], weights=[n for _, n in losses]))
    return {"pictures": len(tokens), "split": options.split, "nats_per_pixel": nats, "bits_per_pixel": bits(nats)}

"""The program `igpt eval`: the generative loss, in the released code's convention."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt.programs.source import Source, bits


@dataclass(frozen=True)
class Options(Source):
    """Nats and bits a pixel. AR: the mean over pictures and all positions [code]; BERT: each picture's mean over its
    masked positions, then over pictures, inputs masked as in training. Of a fine-tuned model the accuracy too, where
    the pictures are labelled by its classes."""

    split: str = "test"
    limit: int | None = None  # only this many pictures, the first ones


@torch.no_grad()
def run(options: Options) -> dict:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit: got {options.limit}, expected at least 1")
    model = options.load_model().eval()
    pictures = options.load_split(model, options.split, lambda n: slice(options.limit))
    tokens = pictures.tokens
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    with tqdm(total=len(tokens), desc="eval", unit="picture") as progress, options.autocast(model):
        for _, x in options.batches(model, tokens):
            masked = None if model.config.causal else model.draw_mask(x, generator).to(model.wte.device)
            # A batch's loss is a mean over its pictures: weighted by their number, the whole set's mean.
            losses.append((float(model.loss(x.to(model.wte.device), masked)), len(x)))
            progress.update(len(x))
    nats = float(np.average([loss for loss, _ in losses], weights=[n for _, n in losses]))
    result = {"pictures": len(tokens), "split": options.split, "nats_per_pixel": nats, "bits_per_pixel": bits(nats)}
    if not model.config.classes or pictures.labels is None:
        return result
    names = model.class_names or pictures.classes
    if len(names) != model.config.classes or not set(pictures.classes) <= set(names):
        warnings.warn(f"no accuracy: {pictures.name} has classes {pictures.classes}, the model {names}", stacklevel=2)
        return result
    labels = torch.tensor([names.index(name) for name in pictures.classes])[torch.from_numpy(pictures.labels)]
    right = options.probabilities(model, tokens).argmax(-1) == labels
    return {**result, "accuracy": right.double().mean().item()}

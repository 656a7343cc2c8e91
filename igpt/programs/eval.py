"""The program `igpt eval`: the generative loss, in the released code's convention; of a ViT how often it is right."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from igpt import data
from igpt.model import ImageGPT
from igpt.programs.source import Source, bits
from igpt.vit import ViT


@dataclass(frozen=True)
class Options(Source):
    """Nats and bits a pixel. AR: the mean over pictures and all positions [code]; BERT: each picture's mean over its
    masked positions, then over pictures, inputs masked as in training. Of a fine-tuned model the accuracy too, where
    the pictures are labelled by its classes. Of a ViT nats a picture and accuracy."""

    kinds = (ImageGPT, ViT)
    split: str = "test"
    limit: int | None = None  # only this many pictures, the first ones


@torch.no_grad()
def run(options: Options) -> dict:
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit: got {options.limit}, expected at least 1")
    model = options.load_model().eval()
    if isinstance(model, ViT):
        return of_labels(options, model)
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
    try:
        labels = rows_of(model, pictures)
    except ValueError as error:
        warnings.warn(f"no accuracy: {error}", stacklevel=2)
        return result
    right = options.probabilities(model, tokens).argmax(-1) == labels
    return {**result, "accuracy": right.double().mean().item()}


def rows_of(model, pictures: data.Pictures) -> torch.Tensor:
    """The row of the model's classifier that each picture's label is, int64. Raises ValueError for other classes."""
    names = model.class_names or pictures.classes
    if len(names) != model.config.classes or not set(pictures.classes) <= set(names):
        raise ValueError(f"{pictures.name} has classes {pictures.classes}, the model {names}")
    return torch.tensor([names.index(name) for name in pictures.classes])[torch.from_numpy(pictures.labels)]


def of_labels(options: Options, model: ViT) -> dict:
    if model.config.objective != "labels" or not model.config.classes:
        got = f"objective {model.config.objective!r} and {model.config.classes} classes"
        raise ValueError(f"model: {options.model} has {got}, expected a ViT that tells classes")
    pictures = data.load(
        options.data, options.split, size=model.config.size, labels=options.labels, holdout=options.holdout,
        skip_bad=options.skip_bad, workers=None, pick=lambda n: slice(options.limit),
    ).labelled()  # fmt: skip
    labels, sums = rows_of(model, pictures), torch.zeros(2, dtype=torch.float64)
    with tqdm(total=len(labels), desc="eval", unit="picture") as progress, options.autocast(model):
        for rows, y in options.batches(model, labels.numpy()):
            logits = model(torch.from_numpy(pictures.images[rows]).to(model.device)).float().cpu()
            sums += torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(-1) == y).sum()])
            progress.update(len(y))
    nats, accuracy = (sums / len(labels)).tolist()
    return {"pictures": len(labels), "split": options.split, "nats_per_picture": nats, "accuracy": accuracy}

"""Logistic regression on raw pixels by the probe's protocol: `python reports/raw_pixels.py DATA`."""

import sys

import torch

from igpt import data
from igpt.programs import logistic
from igpt.programs.source import spread


def split(name, count=None):
    """(pixels in [0, 1], labels) of `count` pictures, evenly spread over a split, as `igpt probe` takes them."""
    pictures = data.load(sys.argv[1], name)
    rows = spread(len(pictures), count or len(pictures))
    images = pictures.images[rows]
    images = images[..., :1] if (images == images[..., :1]).all() else images  # of greys one channel says all
    return torch.from_numpy(images).flatten(1) / 255, torch.from_numpy(pictures.labels[rows])


classes = len(data.load(sys.argv[1], "train").classes)
train, valid, test = split("train", 10_000), split("valid", 1111), split("test")
found = {C: logistic.fit(*train, classes, C).accuracy(*valid) for C in (0.001, 0.01, 0.1, 1.0, 10.0)}
best = max(found, key=found.get)
both = [torch.cat(pair) for pair in zip(train, valid)]
print(f"validation {found}, C {best}, test {logistic.fit(*both, classes, best).accuracy(*test):.4f}")

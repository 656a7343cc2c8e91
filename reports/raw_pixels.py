import sys

import torch

from igpt import data, logistic
from igpt.source import spread


def split(name, k):
    pictures = data.load(sys.argv[1], name)
    rows = spread(len(pictures), k or len(pictures))
    return torch.from_numpy(pictures.images[rows, :, :, 0]).flatten(1) / 255, torch.from_numpy(pictures.labels[rows])

(x, y), (a, b), (t, u) = split("train", 10_000), split("valid", 1111), split("test", None)
found = {C: logistic.fit(x, y, 10, C).accuracy(a, b) for C in (0.001, 0.01, 0.1, 1.0, 10.0)}
C = max(found, key=found.get)
print(found, C, logistic.fit(torch.cat([x, a]), torch.cat([y, b]), 10, C).accuracy(t, u))

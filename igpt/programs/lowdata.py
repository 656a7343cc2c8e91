"""The program `igpt lowdata`: few labels a class, logistic regression on frozen features (paper section 4.5)."""

from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from igpt.programs import features, logistic
from igpt.programs.source import Labelled


@dataclass(frozen=True)
class Options(Labelled):
    """Fit on k labelled pictures a class, several random subsets each; report test error, mean and deviation."""

    k: tuple[int, ...] = (4, 25, 400)  # labels a class
    subsets: int = 5
    layer: int | None = None  # whose features; default: the middle one, as choosing one would take labels
    C: float = 0.1  # inverse regularisation ([open] in the paper)


def run(options: Options) -> dict:
    if not options.k or not options.C > 0:
        raise ValueError(f"k, C: got {options.k}, {options.C}, expected numbers of labels, and a positive number")
    model = options.load_model().eval()
    train, test = options.load_labelled(model, "train+valid", "test")
    layer = (model.config.n_layer + 1) // 2 if options.layer is None else options.layer
    if not 0 <= layer <= model.config.n_layer:
        raise ValueError(f"layer: got {layer}, expected 0 to {model.config.n_layer}")
    if options.subsets < 2:
        raise ValueError(f"subsets: got {options.subsets}, expected at least 2, for a deviation")
    draws = {k: [subset(train.labels, k, options.seed + i) for i in range(options.subsets)] for k in options.k}
    # Only the pictures that some subset needs are read.
    needed = np.unique(np.concatenate([rows for subsets in draws.values() for rows in subsets]))
    x_train = features.layers(features.extract(options, model, train.tokens[needed]), layer)
    x_test = features.layers(features.extract(options, model, test.tokens), layer)
    y_test, classes, device = torch.from_numpy(test.labels), len(train.classes), model.wte.device
    report = {"layer": layer, "C": options.C, "subsets": options.subsets, "k": {}}
    for k, subsets in tqdm(draws.items(), desc="labels a class"):
        errors = []
        for rows in subsets:
            x, y = x_train[np.searchsorted(needed, rows)].to(device), torch.from_numpy(train.labels[rows])
            errors.append(100 * (1 - logistic.fit(x, y, classes, options.C).accuracy(x_test, y_test)))
        row = {"labels": k * len(np.unique(train.labels)), "error": np.mean(errors), "std": np.std(errors, ddof=1)}
        report["k"][str(k)] = {name: round(float(value), 2) for name, value in row.items()}
    return report


def subset(labels: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Row numbers of k pictures of each class, without repetition. Raises ValueError if a class has fewer."""
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    rng = np.random.default_rng([seed, k])
    rows = []
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        if len(members) < k:
            raise ValueError(f"k: got {k}, but class {c} has {len(members)} labelled pictures")
        rows.append(rng.choice(members, k, replace=False))
    return np.concatenate(rows)

"""The program `igpt probe`: a linear classifier on frozen features, layer by layer (paper section 4.2, appendix)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from igpt.programs import features, logistic
from igpt.programs.source import Labelled

WRITTEN = ("probe.json", "probe.png")


@dataclass(frozen=True)
class Options(Labelled):
    """Probe every layer: fit on train, choose layer and C on valid, refit on both, report test."""

    C: tuple[float, ...] = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisation, searched on the validation split
    solver: Literal["lbfgs", "sgd"] = "lbfgs"  # sgd: the paper's recipe for ImageNet; C is then ignored
    lr: tuple[float, ...] = (30.0, 10.0, 3.0)  # of sgd on features of length 1, searched on the validation split
    steps: int = 10_000  # of sgd (paper's ImageNet probes: 1,000,000)
    standardise: bool = True  # features to mean 0 and deviation 1 over the training set (lbfgs)
    join: int = 1  # join this many layers around the best one (XL's 15360 features: 5)
    votes: int = 1  # BERT: masks a test picture is read under; the modal prediction counts, ties at random (paper: 5)
    only: tuple[int, ...] = ()  # these layers instead of all
    out: Path | None = None  # write probe.json and the curve over layers as probe.png into this folder
    force: bool = False  # replace them there


def run(options: Options) -> dict:
    model = options.load_model().eval()
    train, _, test = sets = options.load_labelled(model, "train", "valid", "test")
    every = range(model.config.n_layer + 1)
    wanted = list(options.only) or list(every)
    if strange := [layer for layer in wanted if layer not in every]:
        raise ValueError(f"only: got layers {strange}, expected 0 to {model.config.n_layer}")
    if options.votes < 1 or (options.votes > 1 and model.config.causal):
        raise ValueError(f"votes: got {options.votes}, expected 1, or more for a BERT model")
    if not 1 <= options.join <= len(every):
        raise ValueError(f"join: got {options.join}, expected 1 to {len(every)}")
    if not all(value > 0 for value in (*options.C, *options.lr, options.steps)):
        raise ValueError(f"C, lr, steps: got {options.C}, {options.lr}, {options.steps}, expected positive numbers")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.force and (there := [name for name in WRITTEN if (options.out / name).exists()]):
            raise ValueError(f"out: {options.out} holds {there} already; --force replaces them")
    x_train, x_valid, x_test = (features.extract(options, model, s.tokens, options.out) for s in sets)
    y_train, y_valid, y_test = (torch.from_numpy(s.labels) for s in sets)
    device, classes = model.wte.device, len(train.classes)

    def fit(x, y, strength):
        x = x.to(device)
        if options.solver == "sgd":
            return logistic.fit_sgd(x, y, classes, strength, steps=options.steps, seed=options.seed)
        return logistic.fit(x, y, classes, strength, standardise=options.standardise)

    def search(chosen):
        """(validation accuracy, C or lr) of the best classifier on these layers."""
        a, b = features.layers(x_train, chosen), features.layers(x_valid, chosen)
        grid = options.C if options.solver == "lbfgs" else options.lr
        return max(((fit(a, y_train, s).accuracy(b, y_valid), s) for s in grid), key=lambda found: found[0])

    curve = {layer: search(layer) for layer in tqdm(wanted, desc="layers", unit="layer")}
    best = max(curve, key=lambda layer: curve[layer][0])
    first = min(max(0, best - options.join // 2), len(every) - options.join)
    chosen = best if options.join == 1 else tuple(range(first, first + options.join))
    accuracy, strength = curve[best] if options.join == 1 else search(chosen)
    both = torch.cat([features.layers(x_train, chosen), features.layers(x_valid, chosen)])
    classifier = fit(both, torch.cat([y_train, y_valid]), strength)
    votes = [classifier.predict(features.layers(x_test, chosen))]
    for draw in range(1, options.votes):
        again = features.extract(options, model, test.tokens, options.out, draw=draw)
        votes.append(classifier.predict(features.layers(again, chosen)))
    predicted = modal(torch.stack(votes).cpu(), classes, options.seed)
    report = {
        "layers": {str(layer): {"valid": round(v, 4), "strength": s} for layer, (v, s) in curve.items()},
        "best_layer": best, "joined": list(chosen) if options.join > 1 else [best], "strength": strength,
        "valid_accuracy": round(accuracy, 4), "test_accuracy": round((predicted == y_test).double().mean().item(), 4),
        "pictures": [len(s) for s in sets], "classes": classes,
    }  # fmt: skip
    if options.out:
        write(report, options.out)
    return report


def modal(votes: torch.Tensor, classes: int, seed: int) -> torch.Tensor:
    """The commonest class of each column of votes (k, n), ties at random: (n,)."""
    counts = torch.nn.functional.one_hot(votes, classes).sum(0).double()
    noise = torch.rand(counts.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (counts + 0.5 * noise).argmax(-1)


def write(report: dict, out: Path) -> None:
    """probe.json and, where matplotlib is installed (the viz extra), probe.png."""
    import importlib.util
    import json

    (out / WRITTEN[0]).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no probe.png: matplotlib is not installed (pip install 'igpt[viz]')", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    numbers = np.array([[int(layer), 100 * row["valid"]] for layer, row in report["layers"].items()])
    axes.plot(*numbers.T, marker="o")
    axes.set(xlabel="layer (the last is the final norm)", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    figure.savefig(out / WRITTEN[1], dpi=150)

"""The program `igpt finetune`: the whole model and a classifier together, L_GEN + L_CLF (paper sections 2.4, 4.4)."""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from igpt import data
from igpt.programs.source import Labelled


@dataclass(frozen=True)
class Options(Labelled):
    """Fine-tune, stop early on validation accuracy, report test accuracy of the best epoch."""

    epochs: int = 20
    patience: int = 3  # epochs without a better validation accuracy before it stops
    batch: int = 128
    lr: float = 3e-4  # the paper: often 10 times below pretraining's, no cosine
    generative: float = 1.0  # weight of L_GEN; 0 turns it off
    augment: bool = False  # CIFAR's: reflect-pad 4, a random crop of the picture or of its mirror image
    out: Path | None = None  # export the best model here, with finetune.json


def run(options: Options) -> dict:
    if options.epochs < 1 or options.patience < 1 or options.batch < 1 or not options.lr > 0:
        raise ValueError(
            f"epochs, patience, batch, lr: got {options.epochs}, {options.patience}, {options.batch}, {options.lr}; "
            "expected positive numbers"
        )
    if not 0 <= options.generative < math.inf:
        raise ValueError(f"generative: got {options.generative}, expected 0 or more")
    if options.out and options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"out: {options.out} exists and is not empty, expected a new folder")
    plain = options.load_model()
    train, valid, test = options.load_labelled(plain, "train", "valid", "test")
    if options.augment and train.images is None:
        raise ValueError(f"augment: {options.data} has tokens only, expected pictures")
    model = options.load_model(classes=len(train.classes))
    if model.class_names != train.classes:  # those of an earlier fine-tuning, if any
        torch.nn.init.zeros_(model.classifier)
        model.class_names = train.classes
    torch.manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, betas=(0.9, 0.95))
    best, best_state, since, history, began = -1.0, None, 0, [], time.perf_counter()
    for epoch in range(options.epochs):
        losses = one_epoch(model, optimizer, train, options, epoch)
        accuracy = accuracy_of(model, valid, options)
        history.append({"epoch": epoch, **losses, "valid_accuracy": round(accuracy, 4)})
        tqdm.write(json.dumps(history[-1]))
        since += 1
        if accuracy > best:
            best, since = accuracy, 0
            best_state = {k: v.clone() for k, v in model.state_dict().items()}
        if since >= options.patience:
            break
    model.load_state_dict(best_state)
    accuracy = accuracy_of(model, test, options)
    report = {
        "epochs": history, "valid_accuracy": round(best, 4), "test_accuracy": round(accuracy, 4),
        "pictures": [len(train), len(valid), len(test)], "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    if options.out:
        model.save_pretrained(options.out)
        (options.out / "finetune.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def one_epoch(model, optimizer, train, options: Options, epoch: int) -> dict:
    """One pass over the training set in an order of its own; mean losses."""
    order = np.random.default_rng([options.seed, epoch]).permutation(len(train))
    sums, steps, device = torch.zeros(2), 0, model.wte.device
    for start in tqdm(range(0, len(order), options.batch), desc=f"epoch {epoch}", unit="step", leave=False):
        rows = order[start : start + options.batch]
        tokens = epoch_tokens(train, rows, options, seed=[options.seed, epoch, start]).to(device)
        labels = torch.from_numpy(train.labels[rows]).to(device)
        masked = None if model.config.causal else model.draw_mask(tokens)
        with options.autocast(model):
            h = model.trunk(tokens, masked)
            generative = model.mean_loss(model.nll(h, tokens), masked)
            classifying = F.cross_entropy(model.classify(h).float(), labels)
        loss = options.generative * generative + classifying
        if not loss.isfinite():
            raise ValueError(f"lr: the loss became {loss.item()} in epoch {epoch}; try below {options.lr}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += torch.stack([generative.detach(), classifying.detach()]).float().cpu()
        steps += 1
    return {"generative": round(float(sums[0]) / steps, 4), "classifying": round(float(sums[1]) / steps, 4)}


def epoch_tokens(train, rows, options: Options, seed) -> torch.Tensor:
    if not options.augment:
        return torch.from_numpy(train.tokens[rows].astype(np.int64))
    return train.palette.encode(data.cifar_augment(train.images[rows], np.random.default_rng(seed)))


def accuracy_of(model, pictures, options: Options) -> float:
    """Share of pictures classified right."""
    right = options.probabilities(model, pictures.tokens).argmax(-1) == torch.from_numpy(pictures.labels)
    return right.double().mean().item()

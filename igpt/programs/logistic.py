"""Multinomial logistic regression on features, on a CPU or a GPU: the linear probe's classifier.

`fit` is L-BFGS on scikit-learn's objective, C sum cross-entropy + |W|^2 / 2 with a free intercept, which the paper's
author used for CIFAR and STL; `fit_sgd` is the paper's ImageNet recipe. Features are standardised by the training
set's mean and deviation unless told otherwise ([open] in the paper).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Linear:
    """A fitted classifier: logits = ((x - mean) / std) @ weight^T + bias."""

    weight: torch.Tensor  # (classes, d)
    bias: torch.Tensor  # (classes,)
    mean: torch.Tensor  # (d,)
    std: torch.Tensor  # (d,)

    def predict(self, x) -> torch.Tensor:
        """The likeliest class of each row of x (n, d): int64 (n,)."""
        z = (x.to(self.mean) - self.mean) / self.std
        return F.linear(z.to(self.weight.dtype), self.weight, self.bias).argmax(-1)

    def accuracy(self, x, y) -> float:
        """Share of rows predicted right, in [0, 1]."""
        return (self.predict(x) == y.to(self.mean.device)).double().mean().item()


def _prepared(x, y, classes, standardise):
    if x.dim() != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x, y: got shapes {tuple(x.shape)}, {tuple(y.shape)}, expected (n, d), (n,)")
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"y: got classes from {int(y.min())} to {int(y.max())}, expected 0 to {classes - 1}")
    x, y = x.to(torch.promote_types(x.dtype, torch.float32)), y.long().to(x.device)
    if not len(x) or not x.isfinite().all():
        raise ValueError("x: got NaN or infinite features" if len(x) else "x: got no rows")
    if not standardise:
        return x.float(), y, torch.zeros_like(x[0]), torch.ones_like(x[0])
    # Divided by their largest first, features of any scale have squares that floats can hold.
    tiny = torch.finfo(x.dtype).tiny
    scale = x.abs().amax(0).clamp(min=tiny)
    shares = x / scale
    # A constant feature says nothing: whatever it is divided by, it is about zero.
    mean, std = shares.mean(0), shares.std(0, correction=0).clamp(min=1e-6)
    return ((shares - mean) / std).float(), y, scale * mean, (scale * std).clamp(min=tiny)


def fit(x, y, classes: int, C: float = 1.0, *, standardise: bool = True, max_iter: int = 300) -> Linear:
    """L-BFGS to convergence or max_iter: x (n, d) float, y (n,) int in [0, classes).

    C is scikit-learn's inverse regularisation. Raises ValueError for features that are not finite or C <= 0."""
    if not C > 0:
        raise ValueError(f"C: got {C}, expected a positive number")
    z, y, mean, std = _prepared(x, y, classes, standardise)
    weight = torch.zeros(classes, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(classes, device=z.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, history_size=10, tolerance_grad=1e-6, tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective():
        solver.zero_grad()
        # Divided by C n, so that the tolerances mean the same whatever the set's size.
        loss = F.cross_entropy(F.linear(z, weight, bias), y) + weight.square().sum() / (2 * C * len(z))
        loss.backward()
        return loss

    solver.step(objective)
    return Linear(weight.detach(), bias.detach(), mean, std)


def fit_sgd(x, y, classes: int, lr: float = 3.0, *, steps: int = 10_000, batch: int = 256, seed: int = 0) -> Linear:
    """SGD with momentum 0.9 and a cosine to 0, where L-BFGS on full batches would take too long; no regularisation.

    Features are standardised to mean 0 and variance 1 / d, so that their length is 1 whatever their number, and an lr
    of 30, 10 or 3 [paper, ImageNet probes, over 1,000,000 steps] means the same for every width."""
    if not lr > 0 or steps < 1 or batch < 1:
        raise ValueError(f"lr, steps, batch: got {lr}, {steps}, {batch}, expected positive numbers")
    z, y, mean, std = _prepared(x, y, classes, True)
    weight = torch.zeros(classes, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(classes, device=z.device, requires_grad=True)
    solver = torch.optim.SGD([weight, bias], lr=lr / z.shape[1], momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(0, len(z), (min(batch, len(z)),), generator=generator).to(z.device)
        solver.zero_grad()
        F.cross_entropy(F.linear(z[rows], weight, bias), y[rows]).backward()
        solver.step()
        schedule.step()
    return Linear(weight.detach(), bias.detach(), mean, std)

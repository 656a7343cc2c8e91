"""The probe's classifier against scikit-learn, and the small functions around it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from igpt.programs import logistic, lowdata, probe


def blobs(n, d=20, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99)) * 0.7
    y = torch.randint(0, classes, (n,), generator=g)
    # Columns of very different scale and offset, as features have.
    x = (centres[y] + torch.randn(n, d, generator=g)) * torch.logspace(-2, 2, d) + torch.linspace(-50, 50, d)
    return x, y


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_fit_is_scikit_learns(C):
    (x, y), (x_test, y_test) = blobs(600), blobs(2000, seed=1)
    ours = logistic.fit(x, y, 5, C, max_iter=1000)
    z, z_test = (((t - x.mean(0)) / x.std(0, correction=0)).double().numpy() for t in (x, x_test))
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(z, y.numpy())
    assert abs(ours.accuracy(x_test, y_test) - theirs.score(z_test, y_test.numpy())) <= 0.003
    # Softmax regression is free up to a common shift of the classes' intercepts; the weights are unique.
    scale = np.abs(theirs.coef_).max()
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 0.01 * scale


@pytest.mark.parametrize("scale, dtype", [(1e-35, torch.float32), (1e30, torch.float32), (1e250, torch.float64)])
def test_features_of_any_scale(scale, dtype):
    (x, y), (x_test, y_test) = blobs(600), blobs(2000, seed=1)
    x, x_test = x.to(dtype), x_test.to(dtype)
    want, got = logistic.fit(x, y, 5), logistic.fit(scale * x, y, 5)
    agree = (want.predict(x_test) == got.predict(scale * x_test)).double().mean()
    assert agree > 0.995 and want.accuracy(x_test, y_test) > 0.9


def test_a_constant_feature_changes_nothing():
    (x, y), (x_test, _) = blobs(600), blobs(2000, seed=1)
    for value in (0.0, 1e-30, 0.1, 1e30):
        constant, constant_test = (torch.cat([t, torch.full((len(t), 1), value)], 1) for t in (x, x_test))
        agree = logistic.fit(x, y, 5).predict(x_test) == logistic.fit(constant, y, 5).predict(constant_test)
        assert agree.double().mean() > 0.995


def test_sgd_comes_close_to_the_optimum():
    (x, y), (x_test, y_test) = blobs(2000), blobs(2000, seed=1)
    best = logistic.fit(x, y, 5).accuracy(x_test, y_test)
    assert logistic.fit_sgd(x, y, 5, steps=2000).accuracy(x_test, y_test) > best - 0.02


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, y: logistic.fit(x, y, 4), "y: got classes"),
        (lambda x, y: logistic.fit(x, y[:-1], 5), "x, y: got shapes"),
        (lambda x, y: logistic.fit(x, y, 5, C=0), "C: got 0"),
        (lambda x, y: logistic.fit(x * float("nan"), y, 5), "NaN"),
        (lambda x, y: logistic.fit(x[:0], y[:0], 5), "no rows"),
        (lambda x, y: logistic.fit_sgd(x, y, 5, lr=-1), "lr"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(*blobs(50))


def test_modal_vote():
    votes = torch.tensor([[0, 1, 2], [0, 2, 2], [1, 0, 2]])
    picked = probe.modal(votes, 3, seed=0)
    assert picked[0] == 0 and picked[2] == 2
    # A three-way tie is broken at random: over seeds each class wins about a third of the time.
    wins = np.bincount([int(probe.modal(votes, 3, seed=s)[1]) for s in range(300)], minlength=3)
    assert (wins > 60).all()


def test_subsets_hold_k_of_each_class():
    labels = np.repeat(np.arange(4), 30)
    rows = lowdata.subset(labels, 7, seed=3)
    assert len(set(rows)) == 28 and (np.bincount(labels[rows]) == 7).all()
    assert (lowdata.subset(labels, 7, seed=3) == rows).all()
    assert set(lowdata.subset(labels, 7, seed=4)) != set(rows)
    with pytest.raises(ValueError, match="class 0 has 30"):
        lowdata.subset(labels, 31, seed=0)

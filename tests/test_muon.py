"""Muon: what a step is, against a decomposition and PyTorch's own; runs with it, alone and together."""

import math

import pytest
import torch

from igpt.programs import train
from igpt.training.muon import Muon, newton_schulz
from tests import children
from tests.children import options
from tests.test_train import agree, curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def gradients(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("m, n", [(8, 8), (5, 17), (17, 5), (1, 7), (7, 1)])
def test_a_step_has_the_gradient_s_directions_and_singular_values_near_one(m, n):
    """Matrices of condition up to 100: U and V are kept, S is brought to [0.65, 1.25]."""
    u, _, vt = torch.linalg.svd(gradients(3, m, n), full_matrices=False)
    s = torch.logspace(0, -2, min(m, n), dtype=torch.float64)
    inner = u.mT @ newton_schulz(u * s @ vt * 1e3) @ vt.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 1e-12
    assert newton_schulz(torch.zeros(2, m, n)).abs().max() == 0


def test_steps_are_pytorch_s_where_it_has_them():
    """Three steps of the same gradients in bf16, matrix by matrix there and stacked here."""
    ours, theirs = ([torch.zeros(12, 20, requires_grad=True) for _ in range(4)] for _ in range(2))
    one = Muon([{"params": ours}], lr=0.01)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = gradients(12, 20, seed=10 * step + i, dtype=torch.float32)
            q.grad = p.grad.clone()
        one.step(), other.step()
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.02 * q.norm()  # bf16 products of other shapes round otherwise
        assert p.pow(2).mean().sqrt().item() == pytest.approx(3 * 0.01 * 0.2, rel=0.5)


def test_a_matrix_of_parts_is_its_parts():
    whole = torch.zeros(24, 10, requires_grad=True)
    parts = [torch.zeros(8, 10, requires_grad=True) for _ in range(3)]
    whole.grad = gradients(24, 10, dtype=torch.float32)
    for part, gradient in zip(parts, whole.grad.chunk(3)):
        part.grad = gradient.clone()
    Muon([{"params": [whole], "parts": 3}], lr=1.0, dtype=torch.float32).step()
    Muon([{"params": parts}], lr=1.0, dtype=torch.float32).step()
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6) and whole.abs().max() > 0.1


def test_bad_groups():
    for params, parts in (([(4, 4), (4, 8)], 1), ([(4,)], 1), ([(4, 4)], 3)):
        with pytest.raises(ValueError, match="groups: got shapes"):
            Muon([{"params": [torch.zeros(s, requires_grad=True) for s in params], "parts": parts}], lr=1.0)


def test_one_two_and_four_processes_share_a_run(tmp_path):
    """Three layers do not divide by the processes: one of two gets more matrices to work on, one of four none."""
    asked = {"optimizer": "muon", "layers": 3, "width": 24}
    learned = train.run(options(tmp_path / "alone", **asked))
    assert learned["valid_loss"] < math.log(512) - 0.1
    run = tmp_path / "shared"
    stopped_after(2, options(run, **asked))
    children.train_together(2, options(run, **asked), 5)
    children.train_together(4, options(run, **asked), 7)
    assert (run / "checkpoints" / "latest").read_text() == "step-8"
    train.run(options(run, **asked))
    assert agree(curve(run), curve(tmp_path / "alone"))


def test_stopped_and_resumed_it_is_the_same_to_the_bit(tmp_path):
    train.run(options(tmp_path / "whole", optimizer="muon", dtype="bf16"))
    asked = options(tmp_path / "parts", optimizer="muon", dtype="bf16")
    stopped_after(6, asked)
    train.run(asked)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def stopped_after(step, asked):
    """A process of its own that SIGTERM ended when the figures of `step` were in: its checkpoint is the next step's."""
    child = children.start(children.train_until, asked, step)
    child.join(120)
    assert child.exitcode == 0
    assert (asked.run / "checkpoints" / "latest").read_text() == f"step-{step + 1}"

"""The error budget: a kernel may be at most twice as far from fp64 as eager PyTorch in the same dtype.

|kernel - fp64| <= 2 |eager - fp64| + rounding, in the maximum and in the root mean square, for the output and every
gradient. `rounding` is one half unit in the last place of the output's dtype at the largest value of the fp64 answer:
where eager happens to be exact, a kernel may still round its result once.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Errors:
    """Maximum and RMS error of ours and of eager against fp64, the rounding allowance and the largest fp64 value;
    `ok` is the budget."""

    name: str
    ours_max: float
    eager_max: float
    ours_rms: float
    eager_rms: float
    rounding: float
    finite: bool
    peak: float = 0.0

    @property
    def ok(self) -> bool:
        return (
            self.finite
            and self.ours_max <= 2 * self.eager_max + self.rounding
            and self.ours_rms <= 2 * self.eager_rms + self.rounding
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: max {self.ours_max:.3e} (eager {self.eager_max:.3e}), rms {self.ours_rms:.3e} "
            f"(eager {self.eager_rms:.3e}), rounding {self.rounding:.1e}{'' if self.ok else '  OVER BUDGET'}"
        )


def compare(name: str, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> Errors:
    """Errors of two computations of one tensor against its fp64 value. Shapes must agree; ours must be finite where
    the exact value is."""
    if not ours.shape == eager.shape == exact.shape:
        raise ValueError(f"{name}: shapes {tuple(ours.shape)}, {tuple(eager.shape)}, {tuple(exact.shape)} differ")
    if exact.dtype != torch.float64:
        raise ValueError(f"{name}: exact is {exact.dtype}, expected float64")
    if not exact.numel():
        return Errors(name, 0.0, 0.0, 0.0, 0.0, 0.0, finite=True)
    errors = [x.double() - exact for x in (ours, eager)]
    peak, *tops = (x.abs().max().item() for x in (exact, *errors))
    rms = (x.square().mean().sqrt().item() for x in errors)
    return Errors(name, *tops, *rms, torch.finfo(ours.dtype).eps / 2 * peak, bool(ours.isfinite().all()), peak)


def against_fp64(ours, eager, inputs: dict, diff: tuple[str, ...], grad_output=None) -> list[Errors]:
    """Run `ours(**inputs)`, `eager(**inputs)` and `eager` in fp64 with the same values; compare the output and the
    gradient of every input named in `diff`, for the same upstream gradient (default: a fixed random one)."""

    def run(fn, dtype=None):
        def given(v):
            return v.detach().to(dtype if v.is_floating_point() else None) if torch.is_tensor(v) else v

        args = {k: given(v).requires_grad_() if k in diff else given(v) for k, v in inputs.items()}
        out = fn(**args)
        return [out.detach(), *torch.autograd.grad(out, [args[k] for k in diff], upstream(out))] if diff else [out]

    def upstream(out):
        if grad_output is not None:
            return grad_output.to(out)
        gen = torch.Generator().manual_seed(out.numel())
        return torch.randn(out.shape, generator=gen).to(out)

    results = zip(("out", *(f"d{k}" for k in diff)), run(ours), run(eager), run(eager, torch.float64))
    return [compare(name, a, b, c) for name, a, b, c in results]

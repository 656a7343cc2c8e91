"""What is checked: errors against fp64 within the budget of budget.py, and what a GPU alone can show: the same bits in
every run, in a CUDA graph and under torch.compile, a first step that nobody waits for, and no bad access to memory.

A check returns the fields that it sets in its row; what it raises makes the row red.
"""

import copy
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import igpt
from bench.cases import DTYPES, PIXEL_OPS, Case, Draw, decode_case, tokens
from bench.correctness.budget import Errors, against_fp64, compare
from bench.machine import ended, raised, stamp
from bench.rows import Row
from bench.speed import models
from bench.speed.measure import blank
from igpt import ImageGPT, ops, sample
from igpt.config import preset
from igpt.kernels import reference
from igpt.training.graphed import train_step

SANITIZERS = ("memcheck", "racecheck")
FIRST_STEP_S = 30.0  # from nothing to the first gradients, every kernel compiled on the way
FIRST_STEP = """
import sys, torch, igpt
preset, device = sys.argv[1:]
model = igpt.ImageGPT.from_preset(preset, device=device)
with torch.autocast(device, torch.bfloat16):
    loss = model.loss(torch.zeros(2, model.config.n_ctx, dtype=torch.int64, device=device))
loss.backward()
loss.item()
"""


@dataclass(frozen=True)
class Check:
    """A row still blank, and what fills it."""

    row: Row
    run: Callable[[], dict]

    def __call__(self) -> Row:
        try:
            return dataclasses.replace(self.row, **self.run())
        except Exception as fault:
            return dataclasses.replace(self.row, ok=False, note=raised(fault))


def checked(impl: str, check: Callable, case, device: str, *args, **labels) -> Check:
    row = dataclasses.replace(blank("correctness", impl, case, device), **labels)
    return Check(row, functools.partial(check, case, device, *args))


def judged(errors: list[Errors]) -> dict:
    """The largest error of ours and of eager, each tensor's relative to its fp64 peak."""
    ours, eager = (max(getattr(e, name) / (e.peak or 1.0) for e in errors) for name in ("ours_max", "eager_max"))
    over = "; ".join(str(e) for e in errors if not e.ok)
    return {"err_vs_fp64": ours, "eager_err_vs_fp64": eager, "ok": not over, "note": over}


def equal(wanted: list, others: Iterable[list]) -> dict:
    """Green if every other list of tensors has the wanted bits."""
    differ = [not all(map(torch.equal, wanted, other)) for other in others]
    return {"ok": not any(differ), "note": f"{sum(differ)} of {len(differ)} differ" if any(differ) else "bit-equal"}


def operation(case: Case, device: str, impl: str = "triton") -> dict:
    """Output and gradients within the budget; of palettes each token to the bit."""
    ours, inputs = case.ours(impl), case.inputs(device)
    if case.op not in PIXEL_OPS:
        return judged(against_fp64(ours, case.reference(), inputs, case.diff))
    differ = int((ours(**inputs) != case.reference()(**inputs)).sum())
    note = f"{differ} differ of {case.B * case.N}" if differ else "bit-equal"
    return {"ok": not differ, "err_vs_fp64": float(differ), "eager_err_vs_fp64": 0.0, "note": note}


def in_fp8(case: Case, device: str) -> dict:
    """A product in 8 bits and its gradient for x, beside those of the same rounded numbers in fp64, and in bf16, which
    holds them exactly."""
    draw, wide = Draw(case, device), 4 * case.d
    x, weight, dy = draw.normal(case.T, case.d), draw.weight(wide, case.d), draw.normal(case.T, wide)
    y = ops.linear(x.requires_grad_(), weight, fp8=True, impl="triton")
    errors = []
    for name, ours, a, b in (("y", y, x, weight), ("dx", torch.autograd.grad(y, x, dy)[0], dy, weight.t())):
        a, b = (q.double() * scale for q, scale in map(reference.quantize_rows, (a.detach(), b)))
        errors.append(compare(name, ours.detach(), F.linear(a.to(x.dtype), b.to(x.dtype)), F.linear(a, b)))
    return judged(errors)


def whole_model(case: Case, device: str, impl: str = "triton") -> dict:
    """Loss of each pixel, and all gradients as one vector, of a whole model on real pictures."""
    model, ids = models.ours(case, device), tokens(case.B, case.N, device)
    model.impl = impl

    def nll(model):
        logits = models.eager_logits(model, ids)
        return F.cross_entropy(reference.wide(logits).flatten(0, 1), ids.flatten(), reduction="none")

    losses, grads = [], []
    exact = copy.deepcopy(model).double()
    for m, loss in ((model, lambda m: m.nll(m.trunk(ids), ids)), (model, nll), (exact, nll)):
        losses.append(loss(m).flatten())
        found = torch.autograd.grad(losses[-1].mean(), list(m.parameters()))
        grads.append(torch.cat([g.flatten() for g in found]))
    return judged([compare("nll", *(x.detach() for x in losses)), compare("gradients", *grads)])


def decoded(case: Case, device: str) -> dict:
    """Decoding at a preset's width: two layers, N positions, the log-likelihood of real pictures by decode and by the
    full forward of the same dtype, both against fp64; in fp32 greedy decoding must be the argmax."""
    torch.manual_seed(0)
    model = ImageGPT(preset(case.preset, n_layer=2, n_ctx=case.N, vocab=512), device=device)
    torch.nn.init.normal_(model.head, std=0.1)
    exact = ImageGPT(model.config, impl="torch", device=device, dtype=torch.float64)
    exact.load_state_dict(model.to(DTYPES[case.dtype]).state_dict())
    ids = tokens(case.B, case.N, device)
    with torch.no_grad():
        answers = [m(ids).to(torch.promote_types(m.wte.dtype, torch.float32)) for m in (model, exact)]
    eager, truth = (x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] for x in answers)
    found = judged([compare("log-likelihood", sample.log_likelihood(model, ids), eager, truth)])
    if case.dtype == "fp32":
        keep = max(1, case.N - 48)  # of more positions some would have two likeliest colours
        greedy = model.complete(ids, keep, temperature=0.0)
        if differ := int((model(greedy).argmax(-1) != greedy)[:, keep:].sum()):
            note = f"greedy decoding differs from the full forward's argmax at {differ} positions"
            found |= {"ok": False, "note": f"{found['note']} {note}".strip()}
    return found


def decoding(device: str) -> list[Check]:
    """At the presets' widths; on a GPU for few pictures and for many, which are other kernels, and where keys split."""
    batches, N = ((3, 16), 640) if device == "cuda" else ((3,), 40)
    sizes = itertools.product("sml", ("fp32", "bf16"), batches)
    return [checked("decode", decoded, decode_case(name, B, N, dtype), device) for name, dtype, B in sizes]


def determinism(case: Case, device: str, runs: int) -> dict:
    """Output and gradients of `runs` runs, compared to the bit."""
    inputs = case.inputs(device)
    return equal(case.answers("triton", inputs), (case.answers("triton", inputs) for _ in range(runs - 1)))


def compiled(case: Case, device: str) -> dict:
    """A loss and its gradients through torch.compile without a graph break, bit-equal to eager."""
    model = models.ours(case, device)
    model.impl = "triton"
    ids = tokens(case.B, case.N, device)

    def run(loss: Callable) -> list[torch.Tensor]:
        value = loss(ids)
        return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

    return equal(run(model.loss), [run(torch.compile(model.loss, fullgraph=True, backend="aot_eager"))])


def graphed(case: Case, device: str) -> dict:
    """Six steps of igpt.graphed, the last four replayed, against the same without a graph: losses, norms, weights."""
    batches = torch.randint(0, 512, (6, case.B, case.N))

    def trained(stepper: Callable, rate) -> list[torch.Tensor]:
        model = models.ours(case, device)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=True)

        def loss(tokens):
            with torch.autocast(device, torch.bfloat16):
                return model.loss(tokens)

        step = stepper(loss, optimizer)
        return [*(step(batch) for batch in batches), *model.parameters()]

    def eager(loss, optimizer):
        return lambda batch: train_step(loss, [optimizer], 1, 0.5, [batch.to(device)])

    wanted = trained(eager, torch.tensor(1e-3, device=device))
    return equal(wanted, [trained(functools.partial(igpt.graphed, clip=0.5), 1e-3)])


def first_step(device: str, preset: str) -> Iterator[Row]:
    """Seconds of a process that imports igpt and gets to the first gradients, with an empty compile cache."""
    row = Row("model", "first step", "ours", "bf16", "fwd+bwd", preset=preset, B=2, **stamp(device))
    with tempfile.TemporaryDirectory() as empty:
        start = time.monotonic()
        command = [sys.executable, "-c", FIRST_STEP, preset, device]
        code, said = ended(command, env=os.environ | {"TRITON_CACHE_DIR": empty})
        seconds = time.monotonic() - start
    if code:
        yield dataclasses.replace(row, ok=False, note=said.strip().rpartition("\n")[2][:200])
    else:
        note = f"{seconds:.1f} s from import, nothing compiled before; at most {FIRST_STEP_S:.0f}"
        yield dataclasses.replace(row, median_ms=1e3 * seconds, runs=1, ok=seconds <= FIRST_STEP_S, note=note)


def sanitizer(device: str, seconds: float, tool: str | None) -> Iterator[Row]:
    """compute-sanitizer over small cases of attention; a tool that isn't there is listed as absent."""
    for name in SANITIZERS:
        row = Row("correctness", op=name, impl="triton", dtype="bf16", direction="fwd+bwd", **stamp(device))
        if not tool:
            yield dataclasses.replace(row, note="absent: compute-sanitizer is not installed")
            continue
        check = [sys.executable, "-m", "bench.correctness", "--device", device, "--list", "sanitizer"]
        # torch's caching allocator would hide an access past the end of a tensor.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, said = ended([tool, "--tool", name, "--error-exitcode", "9", *check], seconds / len(SANITIZERS), env)
        note = "not finished in its time: nothing is known" if code is None else said.strip().rpartition("\n")[2][:200]
        yield dataclasses.replace(row, ok=code in (0, None), note=note)

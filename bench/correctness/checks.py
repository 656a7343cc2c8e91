"""What a GPU alone can show besides errors and times: the same bits in every run, in a CUDA graph and under
torch.compile, a first step that nobody waits for, and no bad access to memory."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

import igpt
from bench.cases import Case
from bench.machine import ROOT, attempted, stamp
from bench.rows import Row
from bench.speed import models
from bench.speed.measure import blank
from bench.speed.models import ModelCase

SANITIZERS = ("memcheck", "racecheck")
FIRST_STEP_S = 30.0  # from import to the first fused step, every kernel compiled on the way
FIRST_STEP = """
import sys, time
start, (preset, device) = time.monotonic(), sys.argv[1:]
import torch, igpt
model = igpt.ImageGPT.from_preset(preset, device=device)
with torch.autocast(device, torch.bfloat16):
    loss = model.loss(torch.zeros(2, model.config.n_ctx, dtype=torch.int64, device=device))
loss.backward()
loss.item()
print(time.monotonic() - start)
"""


def equal(row: Row, wanted: list, others: Iterator[list]) -> Row:
    """Green if every other list of tensors has the wanted bits."""
    differ = [not all(map(torch.equal, wanted, other)) for other in others]
    note = f"{sum(differ)} of {len(differ)} differ" if any(differ) else "bit-equal"
    return dataclasses.replace(row, ok=not any(differ), note=note)


def determinism(case: Case, device: str, runs: int) -> Row:
    """Output and gradients of `runs` runs, compared to the bit."""
    row = dataclasses.replace(blank("correctness", f"triton, {runs} runs", case, device), direction="fwd+bwd")

    def check():
        args = {k: v.detach().requires_grad_(k in case.diff) for k, v in case.inputs(device).items()}

        def once():
            out = case.ours("triton")(**args)
            return [out.detach(), *torch.autograd.grad(out, [args[k] for k in case.diff], torch.ones_like(out))]

        return equal(row, once(), (once() for _ in range(runs - 1)))

    return attempted(row, check)


def step(way: str, device: str, N: int) -> Row:
    """A loss and its gradients bit-equal to eager: "compiled", through torch.compile without a graph break, or "CUDA
    graph", replayed on other tokens than it was captured with."""
    case = ModelCase("tiny", 1, N, "bf16", "fwd+bwd")
    row = dataclasses.replace(blank("correctness", f"triton, {way}", case, device), op="step")
    if way == "CUDA graph" and device != "cuda":
        return dataclasses.replace(row, note="absent: no GPU")

    def check():
        model = models.ours(case, device)
        first, second = torch.randint(0, 512, (2, 1, N), device=device)

        def run(tokens, loss=model.loss):
            value = loss(tokens)
            return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

        if way == "compiled":
            whole = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
            answer = equal(row, run(second), [run(second, whole)])
            # On a CPU, where this is only rehearsed, what is compiled leaves igpt/ops/cpu.py out.
            return dataclasses.replace(answer, ok=answer.ok or device == "cpu")
        tokens, aside, graph = first.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is lazily set up must be there before the capture
            run(tokens)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            results = run(tokens)
        tokens.copy_(second)
        graph.replay()
        return equal(row, run(second), [results])

    return attempted(row, check)


def graphed(device: str) -> Row:
    """Six steps of igpt.graphed, the last four replayed, against a loop of its own: losses, norms and weights."""
    case = ModelCase("tiny", 4, 1024, "fp32", "step")
    row = dataclasses.replace(blank("correctness", "triton, igpt.graphed", case, device), op="step")
    if device != "cuda":
        return dataclasses.replace(row, note="absent: no GPU")
    batches = torch.randint(0, 512, (6, 4, 1024))

    def built():
        model = models.ours(case, device)
        return model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def loss(model, tokens):
        with torch.autocast(device, torch.bfloat16):
            return model.loss(tokens)

    def loop():
        model, optimizer = built()
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=device)
        for tokens in batches.to(device):
            value = loss(model, tokens)
            value.backward()
            yield value.detach()
            yield torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        yield from model.parameters()

    def replayed():
        model, optimizer = built()
        step = igpt.graphed(lambda tokens: loss(model, tokens), optimizer, clip=0.5)
        for tokens in batches:
            yield from (figure.clone() for figure in step(tokens))  # the next replay writes to the same places
        yield from model.parameters()

    return attempted(row, lambda: equal(row, list(loop()), [list(replayed())]))


def first_step(device: str, preset: str) -> Iterator[Row]:
    """Seconds from `import igpt` to the first loss and its gradients, with an empty compile cache."""
    row = Row("model", "first step", "ours", "bf16", "fwd+bwd", preset=preset, B=2, **stamp(device))
    with tempfile.TemporaryDirectory() as empty:
        run = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, preset, device], cwd=ROOT, env=os.environ | {"TRITON_CACHE_DIR": empty},
            capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        yield dataclasses.replace(row, ok=False, note=" ".join(run.stderr.strip().splitlines()[-1:])[:200])
        return
    seconds = float(run.stdout.split()[-1])
    note = f"{seconds:.1f} s from import, nothing compiled before; at most {FIRST_STEP_S:.0f}"
    ok = seconds <= FIRST_STEP_S or device != "cuda"  # a CPU has nothing to compile, but others to wait for
    yield dataclasses.replace(row, median_ms=1e3 * seconds, runs=1, ok=ok, note=note)


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
        # A session of its own: the checked program must not outlive the tool, on a GPU that others are to be timed on.
        running = subprocess.Popen(
            [tool, "--tool", name, "--error-exitcode", "9", *check], cwd=ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = running.communicate(timeout=seconds / len(SANITIZERS))
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
            yield dataclasses.replace(row, note="not finished in its time: nothing is known")
            continue
        last = said.strip().splitlines()[-1:]
        yield dataclasses.replace(row, ok=running.returncode == 0, note=" ".join(last)[:200])

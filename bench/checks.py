"""What a GPU alone can show besides errors and times: the same bits in every run, in a CUDA graph and under
torch.compile, and no bad access to memory."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator

import torch

from bench.cases import Case
from bench.machine import FAULTS, ROOT, stamp
from bench.rows import Row
from igpt import ImageGPT

SANITIZERS = ("memcheck", "racecheck")


def determinism(cases: Iterable[Case], device: str, runs: int) -> Iterator[Row]:
    """Output and gradients of `runs` runs, compared to the bit."""
    for case in cases:
        row = Row("correctness", impl=f"triton, {runs} runs", **case.labels | {"direction": "fwd+bwd"}, **stamp(device))
        try:
            inputs = case.inputs(device)
            args = {k: v.detach().requires_grad_(k in case.diff) for k, v in inputs.items()}

            def once(args=args, case=case):
                out = case.ours("triton")(**args)
                grad = torch.ones_like(out)
                return [out.detach(), *torch.autograd.grad(out, [args[k] for k in case.diff], grad)]

            first = once()
            differ = sum(not all(torch.equal(a, b) for a, b in zip(first, once())) for _ in range(runs - 1))
        except FAULTS as fault:
            yield dataclasses.replace(row, ok=False, note=f"raised {type(fault).__name__}: {str(fault)[:300]}")
            continue
        yield dataclasses.replace(row, ok=not differ, note=f"{differ} of {runs - 1} differ" if differ else "bit-equal")


def step(device: str) -> Iterator[Row]:
    """A loss and its gradients as one CUDA graph, replayed on other tokens than it was captured with, and through
    torch.compile without a graph break: bit-equal to eager."""
    model = ImageGPT.from_preset("tiny", device=device, dtype=torch.bfloat16)
    first, second = torch.randint(0, 512, (2, 1, 1024), device=device)

    def run(tokens, loss=model.loss):
        value = loss(tokens)
        return [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]

    def compiled():
        return run(second, torch.compile(model.loss, fullgraph=True, backend="aot_eager"))

    def captured():
        tokens, aside, graph = first.clone(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is lazily set up must be there before the capture
            run(tokens)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            results = run(tokens)
        tokens.copy_(second)
        graph.replay()
        return results

    want = run(second)
    for name, way in {"compiled": compiled, "CUDA graph": captured}.items():
        row = Row("correctness", "step", f"triton, {name}", "bf16", "fwd+bwd", preset="tiny", B=1, **stamp(device))
        if name == "CUDA graph" and device != "cuda":
            yield dataclasses.replace(row, note="absent: no GPU")
            continue
        try:
            differ = sum(not torch.equal(a, b) for a, b in zip(want, way(), strict=True))
        except FAULTS as fault:
            yield dataclasses.replace(row, ok=False, note=f"raised {type(fault).__name__}: {str(fault)[:300]}")
            continue
        yield dataclasses.replace(row, ok=not differ, note=f"{differ} tensors differ" if differ else "bit-equal")


def sanitizer(seconds: float, tool: str | None) -> Iterator[Row]:
    """compute-sanitizer over the quick correctness cases of attention; a tool that isn't there is listed as absent."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in SANITIZERS:
        row = Row("correctness", op=name, impl="triton", dtype="bf16", direction="fwd+bwd", **stamp(device))
        if not tool:
            yield dataclasses.replace(row, note="absent: compute-sanitizer is not installed")
            continue
        check = [sys.executable, "-m", "bench.correctness", "--device", "cuda", "--quick", "--op", "attention"]
        # torch's caching allocator would hide an access past the end of a tensor.
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                [tool, "--tool", name, "--error-exitcode", "9", *check], cwd=ROOT, env=env, capture_output=True,
                text=True, timeout=seconds / len(SANITIZERS),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            yield dataclasses.replace(row, note="not finished in its time; no error until then")
            continue
        last = (done.stdout + done.stderr).strip().splitlines()[-1:]
        yield dataclasses.replace(row, ok=done.returncode != 9, note=" ".join(last)[:200])

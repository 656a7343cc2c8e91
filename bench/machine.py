"""What ran the rows: the device, the versions, the commit; and its ceilings, looked up or measured."""

import dataclasses
import datetime
import functools
import platform
import subprocess
import time
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from bench.cost import H200, Ceilings

ROOT = Path(__file__).resolve().parents[1]

# What a case may raise without ending the run: its row says so and is red.
FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    OSError, RuntimeError, TritonError, TypeError, ValueError,
)  # fmt: skip


def attempted(row, check):
    """The row that check() makes of this one, or this one, red, with what was raised."""
    try:
        return check()
    except FAULTS as fault:
        return dataclasses.replace(row, ok=False, note=raised(fault))


def raised(fault: BaseException) -> str:
    """What a row says of it."""
    return f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def stamp(device: str) -> dict:
    """The fields of a Row that say where it comes from."""
    gpu = device == "cuda"
    changed = "+" if _ask("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if gpu else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": (_ask("git", "rev-parse", "--short", "HEAD") or "unknown") + changed,
        "date": datetime.date.today().isoformat(),
    }


def _best(fn, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def ceilings(device: str) -> Ceilings:
    """An H200's from cost.H200; any other machine's measured now: the best of three products a dtype and of three
    copies, seconds at most."""
    name = stamp(device)["gpu"]
    if H200.name in name:
        return H200
    size = 8192 if device == "cuda" else 2048
    flops = {}
    for key, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        flops[key] = 2 * size**3 / _best(functools.partial(torch.mm, a, b))
        if device == "cpu" and key == "bf16":
            flops["fp16"] = flops["bf16"]
            break
    source = torch.ones((1 << 30) if device == "cuda" else (256 << 20), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return Ceilings(name, flops, 2 * source.numel() / _best(functools.partial(target.copy_, source)))

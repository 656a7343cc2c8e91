"""What ran the rows: the device, the versions, the commit; and its ceilings, looked up or measured."""

import datetime
import functools
import os
import platform
import signal
import subprocess
from pathlib import Path

import torch
import triton
from torch.utils.benchmark import Timer

from bench.cost import H200, Ceilings

ROOT = Path(__file__).resolve().parents[1]


def raised(fault: Exception) -> str:
    """What a row says of what its case raised: no fault of one ends the run."""
    return f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:300]}"


def ended(
    command: list, seconds: float | None = None, env: dict | None = None, stdout=subprocess.PIPE
) -> tuple[int | None, str]:
    """(exit code, what was said) of a command run from the repository; past its seconds, if it has any, it is killed
    with all that it started, and the code is None."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=stdout, stderr=subprocess.STDOUT,
        start_new_session=seconds is not None,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said or ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""


def _ask(*command: str) -> str:
    try:
        code, said = ended(command)
        return "" if code else said.strip()
    except OSError:
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


@functools.cache
def ceilings(device: str) -> Ceilings:
    """An H200's from cost.H200; any other machine's measured now: the best of three products a dtype and of three
    copies, seconds at most."""
    name = stamp(device)["gpu"]
    if H200.name in name:
        return H200

    def best(fn, *args) -> float:
        timer = Timer("fn(*args)", globals={"fn": fn, "args": args}, num_threads=torch.get_num_threads())
        return min(timer.timeit(1).mean for _ in range(3))

    size, flops = 8192 if device == "cuda" else 2048, {}
    half = torch.float16 if device == "cuda" else torch.bfloat16  # no CPU is quick in fp16
    for key, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", half)):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        flops[key] = 2 * size**3 / best(torch.mm, a, b)
    source = torch.ones((1 << 30) if device == "cuda" else (256 << 20), dtype=torch.int8, device=device)
    return Ceilings(name, flops, 2 * source.numel() / best(torch.zeros_like(source).copy_, source))

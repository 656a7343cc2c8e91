"""The machine at hand: which device, how much memory it has left, what its data sheet promises."""

import os
import sys
from pathlib import Path

import torch

# Dense bf16 TFLOP/s on the data sheets, by a part of the name that the driver gives; the first match counts.
PEAK_TFLOPS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "MI300X": 1307}


def device_of(name: str) -> torch.device:
    """The device "auto", "cpu" or "cuda" stands for. Raises ValueError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but there is no GPU; expected 'cpu' or 'auto'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, if known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def available_bytes(device: torch.device) -> int:
    """Memory that an allocation on `device` can still get; on "meta", where none is made, any."""
    if device.type == "meta":
        return sys.maxsize
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return min(int(line.split()[1]) * 1024, container_bytes())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the control group that a container runs in may still take; without a limit, any. Files that were read stay
    in its memory as long as nobody else asks for it: those that nobody uses count as free."""
    try:
        limit, used, stat = ((group / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:
        return sys.maxsize
    unused = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
    return sys.maxsize if limit.strip() == "max" else int(limit) - int(used) + unused

"""Compile every kernel for GPUs that aren't here, and read the binaries.

`capture` runs a launcher on meta tensors and records each launch instead of making it; Triton's own argument binder
decides types, constants and divisibility, so what is compiled is what a GPU would run. Each compile has a forked
process of its own: the compiler may abort. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.compiled.rings import read as read_rings
from bench.machine import raised
from bench.rows import CompileRow
from igpt.kernels.device import SHARED_BYTES, target
from igpt.kernels.launching import recording


@dataclass(frozen=True)
class Machine:
    """What is compiled for, and the limits of one multiprocessor (CUDA C programming guide; CDNA3 guide): bytes of
    shared memory, resident warps and blocks, registers, registers given out at a time to a warp. SHARED_BYTES: what one
    block may ask for."""

    target: GPUTarget
    shared: int
    warps: int
    blocks: int
    registers: int = 65536
    granule: int = 256


# Portable tiles must fit the smallest shared memory we know of: an Ada or consumer Ampere card's 99 KB.
TARGETS = {
    "portable": Machine(GPUTarget("cuda", 89, 32), 102400, 48, 24),
    "sm_80": Machine(GPUTarget("cuda", 80, 32), 167936, 64, 32),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), 233472, 64, 32),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), 233472, 64, 32),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 65536, 32, 32, registers=4 * 512 * 64, granule=8 * 64),
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel with its arguments as Triton's binder specialises them."""

    function: JITFunction
    arch: str
    signature: dict
    constexprs: dict
    attrs: dict
    options: dict
    grid: tuple[int, ...]
    values: dict

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def file(self) -> str:
        """The kernel file it stands in."""
        return self.function.module.rsplit(".", 1)[-1]

    @property
    def names(self) -> dict[str, str]:
        """What a row calls it. tile: block sizes, warps and stages, which a tile table decides; variant: the other
        constants, those that are off or absent left out."""
        constants = {self.function.arg_names[path[0]]: v for path, v in self.constexprs.items()}
        sizes = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in constants.items() if k.startswith("BLOCK")]
        flags = {k: v for k, v in constants.items() if not k.startswith("BLOCK") and v not in (False, None, "")}
        tile = " ".join([*sizes, f"w{self.options['num_warps']}", f"s{self.options['num_stages']}"])
        variant = " ".join(k if v is True else f"{k}={v}" for k, v in flags.items())
        return {"kernel": self.file, "function": self.name, "tile": tile, "variant": variant}

    @property
    def key(self) -> tuple:
        """Equal for launches that compile to the same binary."""
        parts = self.signature, self.constexprs, self.attrs, self.options
        return self.function.cache_key, self.arch, *(str(sorted(p.items(), key=str)) for p in parts)


def alias(value):
    """Autograd copies a gradient that someone else still holds: what a recorded launch keeps is not the tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return dataclasses.replace(value, base=value.base.detach()) if hasattr(value, "base") else value


@contextlib.contextmanager
def capture(arch: str) -> Iterator[list[Launch]]:
    """Within this context launchers pick the tiles of `arch` and launch nothing; yields the list of launches."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("bench.compiled: TRITON_INTERPRET is set: kernels decided at import to be interpreted")
    launches: list[Launch] = []
    backend = make_backend(TARGETS[arch].target)

    def record(kernel: JITFunction, grid: tuple, arguments: dict) -> None:
        arguments = arguments | {"debug": False, "instrumentation_mode": ""}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = bind(**arguments)
        options, signature, constexprs, attrs = kernel._pack_args(backend, arguments, bound, specialization, options)
        values = {name: alias(value) for name, value in bound.items()}
        launches.append(Launch(kernel, arch, signature, constexprs, attrs, options.__dict__, grid, values))

    with target(arch), recording(record):
        yield launches


def occupancy(machine: Machine, regs: int, shared: int, warps: int) -> float:
    """Resident warps over the limit, from registers and shared memory (1 KB a block is the system's on Nvidia's)."""
    lanes = machine.target.warp_size
    per_warp = -(-regs * lanes // machine.granule) * machine.granule
    by_registers = machine.registers // max(per_warp * warps, 1)
    by_shared = machine.shared // (shared + 1024) if lanes == 32 else machine.shared // max(shared, 1)
    return min(by_registers, by_shared, machine.blocks, machine.warps // warps) * warps / machine.warps


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def half_dots(asm: dict) -> int:
    """Products in the source that must become matrix instructions: operands of 16 bits, or fp32 read as tf32."""
    if "ttir" not in asm:
        return _count(r"warp_group_dot |ttng\.tc_gen5_mma ", asm["ttgir"])
    dots = re.findall(r"tt\.dot .*", asm["ttir"])
    return sum(bool(re.search(r"xb?f16>|inputPrecision = tf32", dot.split("->")[0])) for dot in dots)


def exp2_under(sass: str) -> int:
    """Exponentials that are issued while a product is in flight. The waits' depths do not tell: ptxas may put a wait
    above what its program has before it, and has."""
    count, groups, is_open = 0, 0, False
    for line in sass.splitlines():
        if "HGMMA." in line:
            is_open = "gsb0" not in line  # the last product of its group says where to report
            groups += not is_open
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", line):
            groups = min(groups, int(wait.group(1), 16))
        elif "MUFU.EX2" in line:
            count += bool(groups or is_open)
    return count


def dumped(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of an Nvidia binary: its resources, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump", file.name]
        usage, sass = (subprocess.check_output([*tool, flag], text=True) for flag in ("-res-usage", "-sass"))
    return usage, sass


def read_cubin(cubin: bytes, ptx: str) -> dict:
    """Registers, stack and instruction counts."""
    usage, sass = dumped(cubin)
    usage = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    wgmma = _count(r"\bHGMMA\.", sass)
    return {
        "regs": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "spill_loads": _count(r"\bLDL\b", sass),
        "spill_stores": _count(r"\bSTL\b", sass),
        "wgmma": wgmma,
        "mma": wgmma + _count(r"\b[HIQ]MMA\.|\bUTC\w*MMA\b", sass),
        "tma": _count(r"\bUTMA(?:LDG|STG|REDG)\b|\bUBLKCP\b", sass),
        "waits": ",".join(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)),
        "exp2": _count(r"\bMUFU\.EX2\b", sass),
        "exp2_under": exp2_under(sass),
        "instructions": _count(r"/\*[0-9a-f]{4,5}\*/ ", sass),
    }


def read_amdgcn(asm: str) -> dict:
    """The same of AMD assembly, from the metadata the compiler writes below the code."""
    meta = {k: int(v) for k, v in re.findall(r"^\s*\.(\w+):\s+(\d+)$", asm, re.M)}
    return {
        "regs": meta["vgpr_count"],
        "stack": meta["private_segment_fixed_size"],
        "spill_loads": meta["vgpr_spill_count"] + meta["sgpr_spill_count"],
        "spill_stores": meta["vgpr_spill_count"] + meta["sgpr_spill_count"],
        "mma": _count(r"\bv_mfma_", asm),
        "exp2": _count(r"\bv_exp_f32", asm),
        "instructions": _count(r"^\t[a-z]+_\w+ ", "\n".join(asm.splitlines())),
    }


def built(launch: Launch):
    """Triton's compiled kernel for launch.arch."""
    source = GluonASTSource if launch.function.is_gluon() else ASTSource
    src = source(launch.function, launch.signature, launch.constexprs, launch.attrs)
    return triton.compile(src, target=TARGETS[launch.arch].target, options=launch.options)


def compile_launch(launch: Launch) -> dict:
    """CompileRow's evidence fields. Raises whatever the compiler raises."""
    kernel = built(launch)
    asm, shared = kernel.asm, kernel.metadata.shared
    found = read_cubin(asm["cubin"], asm["ptx"]) if "cubin" in asm else read_amdgcn(asm["amdgcn"])
    # Warp specialisation adds warps to those asked for.
    total = re.search(r'"ttg\.total-num-warps" = (\d+)', asm["ttgir"])
    warps = int(total[1]) if total else kernel.metadata.num_warps
    occupied = occupancy(TARGETS[launch.arch], found["regs"], shared, warps)
    rings, races = read_rings(asm["ttgir"], asm.get("ptx", ""), launch.values, launch.grid[0])
    found |= {"shared": shared, "dots": half_dots(asm), "occupancy": round(occupied, 3)}
    return found | {"rings": "; ".join(map(str, rings)), "races": "; ".join(races)}


def problems(row: CompileRow) -> list[str]:
    """What is wrong with a binary: each entry is a sentence; an empty list is a good one."""
    found = []
    if row.dots and row.regs <= 32:
        found.append(f"{row.regs} registers: the compiler emptied the kernel")
    if row.dots and not row.mma:
        found.append("a product without matrix instructions")
    if row.dots and row.arch == "sm_90" and not row.wgmma:
        found.append("a product without wgmma")
    if row.stack or row.spill_loads or row.spill_stores:
        found.append(f"spills: {row.stack} bytes of stack, {row.spill_loads} loads, {row.spill_stores} stores")
    if row.shared > (there := SHARED_BYTES[row.arch]):
        found.append(f"{row.shared} bytes of shared memory, {there} exist")
    if row.races:
        found.append(row.races)
    return found


@dataclass(frozen=True)
class Job:
    """One binary to make: a launch and the row it fills."""

    launch: Launch
    row: CompileRow
    cases: set[str]  # all that launch it; the row is named by the first


def judged(job: Job, evidence: dict) -> CompileRow:
    row = dataclasses.replace(job.row, **evidence)
    return dataclasses.replace(row, ok=not problems(row), note="; ".join(problems(row)))


def _child(job: Job, pipe, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    pipe.send(compile_launch(job.launch))


@dataclass(frozen=True)
class Compiler:
    """A process that compiles one binary, and what it says."""

    job: Job
    end: float  # of time.monotonic
    process: multiprocessing.Process
    receiver: Connection
    log: IO

    @classmethod
    def start(cls, job: Job, limit_s: float) -> "Compiler":
        context, log = multiprocessing.get_context("fork"), tempfile.NamedTemporaryFile()  # noqa: SIM115
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(job, sender, Path(log.name)))
        process.start()
        return cls(job, time.monotonic() + limit_s, process, receiver, log)

    def row(self) -> CompileRow:
        """Of a process that has ended, or is late. One that raised, aborted or is late gives a row that says so, with
        the last line of the compiler's that names an error."""
        if (code := self.process.exitcode) is None:
            self.process.kill()
        self.process.join()
        with self.log:
            lines = Path(self.log.name).read_text(errors="replace").splitlines()
        if code is None:
            return dataclasses.replace(self.job.row, ok=False, note="the compiler ran past its time limit")
        if code == 0:
            return judged(self.job, self.receiver.recv())
        lines = [line.strip() for line in lines if line.strip()]
        said = [line for line in lines if re.search(r"(?i)error|assert|fail", line)]
        why = " ".join(dict.fromkeys([*said[-1:], *lines[-1:]]))[:300]
        how = f"exit {code}" if code > 0 else signal.Signals(-code).name
        return dataclasses.replace(self.job.row, ok=False, note=f"the compiler failed ({how}): {why}")


def compile_all(jobs: Iterable[Job], workers: int = 2, limit_s: float = 240) -> Iterator[CompileRow]:
    """A row a job as they finish. Without threads: what forks beside one may inherit a lock that nobody frees."""
    jobs, running = iter(jobs), {}
    while True:
        for job in itertools.islice(jobs, workers - len(running)):
            started = Compiler.start(job, limit_s)
            running[started.process.sentinel] = started
        if not running:
            return
        wait(running, max(0.0, min(c.end for c in running.values()) - time.monotonic()))
        for sentinel, c in list(running.items()):
            if c.process.exitcode is not None or time.monotonic() >= c.end:
                yield running.pop(sentinel).row()


def plan(cases: Iterable, archs: Iterable[str]) -> tuple[list[Job], list[CompileRow]]:
    """Jobs for every case on every architecture, each binary once, and red rows of launchers that raised."""
    jobs, broken, names = {}, [], Counter()
    for arch in archs:
        for case in cases:
            if arch not in case.archs:
                continue
            row = CompileRow("compile", "", "", case.name, arch, "", triton.__version__)
            with capture(arch) as launches:
                try:
                    case.run()
                except Exception as fault:
                    broken.append(dataclasses.replace(row, note=f"the launcher {raised(fault)}"))
                    continue
            if not launches:
                broken.append(dataclasses.replace(row, note="the launcher launched nothing"))
            for launch in launches:
                if launch.key not in jobs:
                    named = dataclasses.replace(row, **launch.names)
                    names[named.key] += 1
                    if names[named.key] > 1:
                        named = dataclasses.replace(named, variant=f"{named.variant} #{names[named.key]}")
                    jobs[launch.key] = Job(launch, named, set())
                jobs[launch.key].cases.add(case.name)
    return list(jobs.values()), broken

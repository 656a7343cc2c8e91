"""What `make gpu` is about to launch, for bench.compiled: the same cases, and so the same binaries."""

from collections.abc import Iterator

from bench.cases import PIXELS, correctness, speed
from bench.compiled.cases import CompileCase, of
from bench.compiled.cases import cases as compile_cases
from bench.rows import Row


def cases() -> Iterator[CompileCase]:
    """Correctness first, as the first stage that follows; then the presets' shapes in bf16, decoding, and
    candidates."""
    presets = speed(("s", "m", "l"), (1024, 2304, 4096), ("bf16",), ("fwd+bwd",), 65536)
    for case in [*correctness(quick=False, gpu=True), *presets, *PIXELS]:
        yield of(case, Row("compile", impl="", **case.labels).case)
    yield from (case for case in compile_cases() if case.name.startswith(("decode", "gelu")))

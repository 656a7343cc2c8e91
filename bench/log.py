"""A run's rows as they come, its child processes, what makes it red, and whose speeds may be shown."""

import itertools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from bench import cases, rows
from bench.compiled import gate
from bench.machine import ended
from bench.report import report
from bench.rows import CompileRow, Row
from bench.speed import measure


class Log:
    """The run's rows: appended to rows.jsonl as they come, and progress on stderr."""

    def __init__(self, out: Path, fresh: bool = True):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.start = out / "rows.jsonl", time.monotonic()
        self.path.open("w" if fresh else "a").close()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def take(self, found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row, self.path)
            self.say(str(row))

    def event(self, what: str, note: str, ok: bool = False) -> None:
        """Something of the run itself that a reader must know: a row, so that later stages know it too."""
        self.take([Row("harness", what, "", "", "", ok=ok, note=note)])

    def rows(self) -> list:
        return rows.read(self.path)

    def child(self, module: str, *arguments: str, interpret: bool = False) -> None:
        """`python -m bench.<module>` beside us, appending its rows to ours: kernels decide at import whether they are
        to be interpreted or compiled, so each needs a process of its own. What it prints goes to stderr. Exit code 1
        is for red rows; without one, or with another code, it died."""
        known, env = len(self.rows()), {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"TRITON_INTERPRET": "1"} if interpret else {}
        self.say(f"bench.{module} {' '.join(arguments)}")
        command = [sys.executable, "-m", f"bench.{module}", *arguments, "--out", str(self.path)]
        code, _ = ended(command, env=env, stdout=sys.stderr)
        if code and (code != 1 or all(row.ok for row in self.rows()[known:])):
            self.event(f"bench.{module}", f"ended with exit code {code}")

    def failures(self) -> list[str]:
        """What makes the run red, by name."""
        found, compiled = [], []
        for row in self.rows():
            if isinstance(row, CompileRow):
                compiled.append(row)
                if not row.ok and (row.arch == "sm_90" or "failed" in row.note or "raised" in row.note):
                    found.append(f"compile {row.function} {row.case} {row.arch} {row.tile}: {row.note}")
            elif isinstance(row, Row) and not row.ok:
                found.append(f"{row.suite} {row.op} {row.case} {row.impl}: {row.note}")
        return found + (gate.compare(compiled, gate.read()) if compiled else [])

    def report(self, extra: str = "") -> int:
        """The report, on disk and stdout, whose last line is one JSON object; the exit code."""
        found, failed = self.rows(), self.failures()
        path = report.write(found, failed, self.path.parent, extra)
        print(path.read_text())
        print(json.dumps({"ok": not failed, "rows": len(found), "failed": failed, "report": str(path)}))
        return 1 if failed else 0

    def prepared(self, device: str, seconds: float, **options) -> measure.Run:
        """A Run of so many seconds that knows which operations are red, and how far each is from fp64."""
        red, errors = set(), {}
        for row in self.rows():
            if not isinstance(row, Row):
                continue
            subject = row.op, row.dtype
            if (row.suite, row.op, row.ok) == ("harness", "bench.correctness", False):
                red |= set(itertools.product((*cases.OPS, "model", "decode"), cases.DTYPES))
            elif row.suite == "correctness" and not row.ok:
                red.add(subject)
            elif row.suite == "correctness" and row.err_vs_fp64 is not None:
                known = errors.get(subject, (0.0, 0.0))
                errors[subject] = max(known, (row.err_vs_fp64, row.eager_err_vs_fp64))
        return measure.Run(
            device, *measure.timers(device), deadline=time.monotonic() + seconds, red=frozenset(red), errors=errors,
            **options,
        )  # fmt: skip

"""The harness that times: rehearsed on a CPU with clocks that lie, so that a GPU's first run dies of no typo."""

import dataclasses
import functools
import itertools
import json
from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import gpu, machine, rows, run
from bench.cases import OPS, PIXEL_OPS, ROW_OPS, Case, decode_case, model_case, shapes
from bench.compiled import step
from bench.correctness import __main__ as correctness
from bench.correctness import checks
from bench.cost import Ceilings
from bench.log import Log
from bench.report import report
from bench.speed import measure, models, pictures, sampling, timing, tune
from bench.speed.models import NOTES, build
from bench.speed.peers import NAMES
from bench.speed.timing import CpuTimer, CudaTimer, interleaved
from igpt.kernels import tiles

SMALL = Case("norm", 1, 16, 1, 32, "fp32")


@pytest.fixture(autouse=True)
def given_ceilings(monkeypatch):
    """No ceiling is measured here, and torch.compile hands back what it got: no C++ compiler."""
    roof = Ceilings("a machine", dict.fromkeys(("fp32", "bf16", "fp16"), 1e12), 1e11)
    monkeypatch.setattr(measure, "ceilings", lambda device: roof)
    monkeypatch.setattr("bench.speed.peers.compiled", lambda fn, device: fn)
    monkeypatch.setattr("bench.speed.models.compiled", lambda fn, device: fn)


def lying_timer() -> CpuTimer:
    """Calls are made, each takes a millisecond."""
    return CpuTimer(clock=functools.partial(next, itertools.count(0, Fraction(1, 1000))))


def lying_run(**options) -> measure.Run:
    return measure.Run("cpu", lying_timer(), lying_timer(), case_s=0.0, least=2, **options)


def test_interleaving_takes_turns_and_keeps_to_its_budget():
    ticks, order = iter(range(10**6)), []
    timer = CpuTimer(clock=lambda: next(ticks))
    variants = [lambda name=name: order.append(name) for name in "abc"]
    times = interleaved(variants, timer, budget_s=20, least=2)
    assert order[:9] == [*"abc", *"bca", *"cab"]
    assert times[0].median == 1000.0 and times[0].runs == len(order) // 3
    assert interleaved(variants, timer, budget_s=0, least=2)[1].runs == 2 and interleaved([], timer, 1.0) == []


def test_statistics():
    s = timing.stats([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (s.median, s.p20, s.p80, s.runs) == (3.0, 2.0, 5.0, 6)


def test_cuda_timer_reads_events_over_a_cold_cache(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("synchronize")

        def elapsed_time(self, end):
            return 0.25

    class Flush:
        def zero_(self):
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("sleep"), raising=False)
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Flush())
    assert CudaTimer()(lambda: happened.append("call")) == 0.25
    assert happened == ["flush", "sleep", "record", "call", "record", "synchronize"]


def test_operations_have_ratios_floors_and_reasons():
    found = {r.impl: r for r in measure.operations([SMALL], lying_run())}
    assert found["ours"].ratios == {"eager": 1.0, "torch.compile": 1.0}
    assert found["ours"].median_ms == 1.0 and found["ours"].pct_floor > 0 and found["ours"].ok
    assert found["liger"].median_ms is None and found["liger"].note.startswith("absent: ")


def test_red_correctness_shows_no_speed():
    (row,) = measure.operations([SMALL], lying_run(red=frozenset([("norm", "fp32")])))
    assert row.median_ms is None and row.flops == 0 and "correctness of norm fp32 is red" in row.note
    (row,) = models.rows([model_case("tiny", 1, 32, "fp32", "fwd")], lying_run(red=frozenset([("norm", "fp32")])))
    assert row.median_ms is None


def test_no_time_left_is_said():
    (row,) = measure.operations([SMALL], lying_run(deadline=float("-inf")))
    assert row.median_ms is None and "no time" in row.note


def test_a_peer_that_raises_is_absent_with_its_words():
    def build(name, case, device):
        return lambda: torch.ones(2) @ torch.ones(2 if name == "ours" else 3)

    group = [(name, SMALL) for name in ("ours", "eager")]
    theirs, ours = measure.together("kernels", group, build, {}, lying_run())
    assert theirs.ok and theirs.note.startswith("absent: raised RuntimeError") and ours.median_ms and ours.ratios == {}


def test_a_model_that_does_not_fit_halves_its_batch(monkeypatch):
    def fake(name, case, device):
        if case.B > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(models, "build", fake)
    row = next(models.rows([model_case("tiny", 16, 32, "fp32", "fwd")], lying_run(peers=("eager",))))
    assert row.B == 2 and row.median_ms == 1.0 and row.per_s == 2 * 32 * 1000


def test_an_optimizer_s_state_is_there_before_a_step_is_known_to_fit(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: taken.append(self))
    for direction, count in (("fwd+bwd", 0), ("step", 1)):
        build("eager", model_case("tiny", 1, 32, "fp32", direction), "cpu")
        assert len(taken) == count


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd", "step"])
def test_every_whole_model_runs(direction):
    found = {r.impl: r for r in models.rows([model_case("tiny", 1, 32, "fp32", direction)], lying_run())}
    assert set(found) == set(NOTES)
    assert all(found.pop(name).note.startswith("absent: ") for name in ("torch.compile graphed", "ours fp8"))
    assert all(r.median_ms and r.mfu for r in found.values()), {n: r.note for n, r in found.items()}
    assert found["ours"].ratios["hugging face"] == 1.0


def test_eager_and_ours_are_one_model():
    case = model_case("tiny", 2, 48, "fp32", "fwd")
    ours, eager = build("ours", case, "cpu")(), build("eager", case, "cpu")()
    torch.testing.assert_close(ours, eager, rtol=2e-5, atol=2e-5)


class Drawn(TorchDispatchMode):
    """Where normal numbers are drawn."""

    def __init__(self):
        super().__init__()
        self.on = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.normal_.default:
            self.on.add(args[0].device.type)
        return func(*args, **(kwargs or {}))


def test_hugging_face_on_a_device_that_is_not_the_cpu():
    """Built under `with torch.device("cuda")` its constructor left it on two devices: no row had this peer."""
    for direction in ("fwd", "step"):
        build("hugging face", model_case("tiny", 2, 32, "bf16", direction), "meta")()
    with Drawn() as drawn:
        model = models.hugging_face(decode_case("tiny", 1, 24, "int8", steps=8).model, "meta")
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert drawn.on == {"meta"}  # a CPU took three quarters of a minute for L's weights


def test_decoding_is_red_by_dtype():
    group = [("ours", decode_case("tiny", 1, 24, dtype, steps=8)) for dtype in ("fp32", "bf16", "int8")]
    red = frozenset([("decode", "bf16")])
    found = {r.dtype: r for r in sampling.rows([group], lying_run(peers=(), red=red))}
    assert found["fp32"].median_ms
    for dtype in ("bf16", "int8"):
        assert found[dtype].median_ms is None and "decode bf16 is red" in found[dtype].note


def test_pictures_against_the_processor_and_k_means():
    found = {r.impl: r for r in pictures.lookup(lying_run(), count=8, theirs=2)}
    assert found["hugging face"].B == 2 and found["ours"].ratios == {"hugging face": 4.0}
    found = {r.impl: r for r in pictures.fit(lying_run(), count=4, k=16)}
    assert found["ours"].ratios == {"scikit-learn": 1.0}
    found = {r.impl: r for r in pictures.folder(lying_run(), count=8, theirs=2, side=40)}
    assert found["hugging face"].B == 2 and found["ours"].ratios == {"hugging face": 4.0}


def test_correctness_rows_can_be_red(monkeypatch):
    check = checks.checked("triton", checks.operation, SMALL, "cpu", "torch")
    assert check().ok
    monkeypatch.setattr(Case, "ours", lambda self, impl: lambda **k: 1.01 * self.reference()(**k))
    assert not check().ok and "OVER BUDGET" in check().note
    monkeypatch.setattr(Case, "ours", lambda self, impl: lambda **k: 1 / 0)
    assert not check().ok and "ZeroDivisionError" in check().note


def test_determinism_rows_can_be_red(monkeypatch):
    case = Case("norm", 1, 8, 1, 16, "fp32")
    assert checks.determinism(case, "cpu", 2)["ok"]
    monkeypatch.setattr(Case, "ours", lambda self, impl: lambda x, weight: x * weight * torch.rand(1))
    assert checks.determinism(case, "cpu", 3) == {"ok": False, "note": "2 of 2 differ"}


def test_correctness_runs_in_parts_and_says_what_is_late(tmp_path):
    argv = ["--device", "cpu", "--list", "quick", "--op", "embed", "--out", str(tmp_path / "rows")]
    assert [correctness.main([*argv, "--part", str(part), "2"]) for part in (0, 1)] == [0, 0]
    assert [(row.op, row.d) for row in rows.read(tmp_path / "rows")] == [("embed", 64), ("embed", 96)]
    assert correctness.main([*argv, "--limit", "-1"]) == 1
    assert rows.read(tmp_path / "rows")[-1].note == "out of time"


def test_unknown_peers_and_options_are_refused(capsys):
    for flags in (["--peers", "eager,nobody"], ["--preset", "xxl"], ["--seq", "17"], ["--suite", "none"]):
        with pytest.raises(SystemExit):
            run.parse(flags)
    said = capsys.readouterr().err
    assert "xxl" in said and "got ['nobody'], expected some of ['all', 'eager'," in said


def quiet(monkeypatch, correct_rows):
    """run.py with its children replaced: correctness says what it is told, nothing is compiled."""
    monkeypatch.setattr(run, "evidence", lambda log, *_: log.take(correct_rows))
    monkeypatch.setattr(measure, "timers", lambda device: (lying_timer(), lying_timer()))
    monkeypatch.setattr(run, "whole", lambda args: [model_case("tiny", 1, 32, "fp32", "fwd")])
    monkeypatch.setattr(run.step, "account", lambda *_: [])
    monkeypatch.setattr(pictures, "QUICK", ())
    monkeypatch.setattr(run.cases, "speed", lambda *_: [SMALL])


def test_last_line_is_json_and_red_exits_1(monkeypatch, tmp_path, capsys):
    good = rows.Row("correctness", "norm", "triton", "fp32", "fwd+bwd", err_vs_fp64=1e-7, eager_err_vs_fp64=1e-7)
    quiet(monkeypatch, [good])
    assert run.main(["--suite", "quick", "--device", "cpu", "--out", str(tmp_path / "a")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is True and last["failed"] == [] and last["rows"] == len(rows.read(tmp_path / "a" / "rows.jsonl"))
    assert "1e-07" in (tmp_path / "a" / "report.md").read_text()

    quiet(monkeypatch, [rows.Row("correctness", "norm", "triton", "fp32", "fwd+bwd", ok=False, note="OVER BUDGET")])
    earlier = ["--baseline", str(tmp_path / "a" / "rows.jsonl")]
    assert run.main(["--suite", "quick", "--device", "cpu", "--out", str(tmp_path / "b"), *earlier]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ok"] is False and "OVER BUDGET" in last["failed"][0]
    assert all(r.median_ms is None for r in rows.read(tmp_path / "b" / "rows.jsonl"))


def test_a_child_that_dies_is_a_failure_that_later_stages_know_of(tmp_path, monkeypatch):
    for code in (1, -11):  # 1 is a traceback's too: there is no red row
        monkeypatch.setattr("bench.log.ended", lambda command, code=code, **_: (code, ""))
        Log(tmp_path).child("correctness")
        log = Log(tmp_path, fresh=False)
        assert f"exit code {code}" in log.failures()[0]
    run = log.prepared("cpu", 1.0)
    assert "is red" in run.refusal(SMALL) and set(OPS) < {op for op, _ in run.red}


def test_report_has_every_section(tmp_path):
    found = [
        rows.Row("correctness", "norm", "triton", "fp32", "fwd+bwd", err_vs_fp64=1e-7, eager_err_vs_fp64=1e-7),
        rows.Row("kernels", "norm", "ours", "fp32", "fwd", median_ms=1.0, ratios={"eager": 2.0}),
        rows.Row("kernels", "norm", "ours", "fp32", "fwd", median_ms=1.1, ratios={"liger": 3.0}),
        rows.Row("kernels", "norm", "eager", "fp32", "fwd", median_ms=2.0),
        rows.CompileRow("compile", "rows", "norm_forward_kernel", "norm", "sm_90", "M4", "3.7.1", note="spills: 8"),
        rows.StepRow("step", "s", 1, 1024, "mm", True, 3, 1e9, 1e12, 1.3),
    ]
    text = report.write(found, ["compile norm"], tmp_path).read_text()
    assert all(word in text for word in ("2.00x", "RED spills: 8", "aten.mm", "total", "**Red:**", "kernels.png"))
    assert (tmp_path / "kernels.png").stat().st_size > 1000


TINY = dict(zip(("preset", "H", "D"), ("tiny", *shapes("tiny"))), B=1, dtype="fp32")
SMALLER = {
    "model": TINY | {"N": 64}, "decode": TINY | {"N": 24, "steps": 8}, "vit": {"preset": "vit-tiny", "N": 65, "B": 2},
}  # fmt: skip
SMALLEST = {"B": 1, "N": 16, "H": 1, "D": 16, "dtype": "fp32", "preset": ""}


def small(x):
    """Cases, or groups of them, small and one of each."""
    if isinstance(x, str):
        return x
    if isinstance(x, Case):
        return dataclasses.replace(x, **SMALLER.get(x.op, SMALLEST))
    found = []
    for y in map(small, x):
        found += [] if y in found else [y]
    return tuple(found) if isinstance(x, tuple) else found


@dataclasses.dataclass(frozen=True)
class Rehearsal(gpu.Job):
    """A GPU's job on a CPU: small cases, and a clock that lies."""

    device: str = "cpu"

    def time(self, rows, chosen, peers, **_):
        assert set(peers) <= set(NAMES)
        run = self.log.prepared("cpu", self.seconds, peers=peers, case_s=0.0, least=2)
        run = dataclasses.replace(run, timer=lying_timer(), step_timer=lying_timer())
        self.log.take(rows(small(chosen), run))

    def search(self, only):
        *_, last = (search for search in tune.searches("portable") if only in search.name)
        last = dataclasses.replace(last, case=small(last.case), values={"num_warps": (4, 8)})
        tune.search([last], bool, lying_run(), self.log.path.with_name("tiles.txt"))


class RehearsalLog(Log):
    """Of what the stages' processes would do, a check of each kind, and one operation's binaries."""

    def child(self, module, *arguments, **_):
        if module == "compiled":
            return super().child(module, "--arch", "sm_90", "--quick", "--case", "palette")
        if arguments[-2] != "0":  # the first of several parts does it
            return None
        found = [Case(op, 1, 16, 1, 16, "fp32", direction="fwd+bwd") for op in ("norm", "palette_encode")]
        found = [checks.checked("triton", checks.operation, case, "cpu") for case in found]
        whole, decode = model_case("tiny", 2, 48, "fp32", "fwd+bwd"), decode_case("tiny", 3, 40, "fp32")
        found.append(checks.checked("triton", checks.whole_model, whole, "cpu"))
        found.append(checks.checked("decode", checks.decoded, decode, "cpu"))
        whole = model_case("tiny", 1, 64, "bf16", "fwd+bwd")
        found.append(checks.checked("triton, compiled", checks.compiled, whole, "cpu", op="step"))
        self.take(check() for check in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are not interpreted")
@pytest.mark.parametrize("half", gpu.HALVES)
def test_both_halves_are_rehearsed(half, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "PRESETS", ("tiny",))
    monkeypatch.setattr(gpu, "STEP_TOKENS", 64)
    monkeypatch.setattr(step, "account", lambda *_: [])  # where kernels are interpreted, no launch can be recorded
    monkeypatch.setattr(checks, "FIRST_STEP_S", 300.0)  # there is nothing to compile, but others to wait for
    monkeypatch.setattr(tune, "this_arch", lambda: "sm_90")
    log = RehearsalLog(tmp_path)
    for _, stage in gpu.HALVES[half].values():
        stage(Rehearsal(log, 1000.0))
    assert log.report() == 0
    last = json.loads(capfd.readouterr().out.splitlines()[-1])
    found = [row for row in rows.read(tmp_path / "rows.jsonl") if isinstance(row, rows.Row)]
    assert last["ok"] and not [row for row in found if row.suite == "harness"]
    seen = {(row.suite, row.op, row.impl) for row in found if row.median_ms or row.suite == "correctness"}
    if half == "first":
        assert {("correctness", "step", "triton, compiled"), ("kernels", "attention", "sdpa"),
                ("kernels", "gelu", "ours"), ("sampling", "decode", "ours")} <= seen  # fmt: skip
        assert {row.op for row in found if row.suite == "correctness"} >= {"norm", "model", "decode", "palette_encode"}
        assert "# of Calls" in (tmp_path / "profile.txt").read_text()
        assert "ATTENTION_DQ  ('portable', 96): Tile(" in (tmp_path / "tiles.txt").read_text()
        assert "encode_kernel" in (tmp_path / "report.md").read_text()
    else:
        assert {("model", "model", "hugging face"), ("model", "model", "torch.compile"), ("model", "vit", "ours"),
                ("sampling", "decode", "hugging face"), ("model", "first step", "ours")} <= seen  # fmt: skip
        assert "NORM_BACKWARD  ('portable', 2048): Tile(" in (tmp_path / "tiles.txt").read_text()


def test_a_gpus_checks_are_of_every_kind():
    found = [(check.row.op, check.row.impl) for check in correctness.listed("gpu", "cpu")]
    repeated = [(op, "triton, 20 runs") for op in ("attention", *ROW_OPS)]
    assert {*repeated, ("step", "triton, compiled"), ("step", "triton, igpt.graphed"), ("decode", "decode"),
            *((op, "triton") for op in ("attention", "ragged attention", "model", "fp8", *ROW_OPS, *PIXEL_OPS)),
            } == set(found)  # fmt: skip


def test_a_sanitizer_that_fails_is_red_and_one_that_hangs_leaves_nothing_behind(tmp_path):
    tool = tmp_path / "tool"
    for script, ok, said in (("exit 1", False, ""), ("exit 9", False, ""), ("sleep 60 & wait", True, "not finished")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        found = list(checks.sanitizer("cpu", 1.0, str(tool)))
        assert [row.ok for row in found] == [ok] * 2 and all(said in row.note for row in found)


def test_what_is_of_another_dtype_takes_no_speed_away():
    others = frozenset([("norm", "bf16"), ("step", "fp32")])
    assert next(measure.operations([SMALL], lying_run(red=others, peers=("eager",)))).median_ms
    cases = [model_case("tiny", 1, 32, "fp32", "fwd")]
    assert next(models.rows(cases, lying_run(red=others, peers=("eager",)))).median_ms


def test_a_tile_is_pasted_where_it_beats_the_table(monkeypatch):
    monkeypatch.setattr(tune, "stamp", lambda device: {"gpu": "NVIDIA H200"})
    assert "ATTENTION_FORWARD ('sm_80', 64)" in {s.name for s in tune.searches("sm_80")}
    search = {s.name: s for s in tune.searches("sm_90")}["ATTENTION_HOPPER_FORWARD 128"]
    now, *others = search.candidates()
    assert now == tiles.ATTENTION_HOPPER_FORWARD[128] and len(others) == 3
    with search.using(others[0]):
        assert tiles.ATTENTION_HOPPER_FORWARD[128] == others[0]
    row = tune.paste(search, [(1.0, others[-1]), (1.2, now)], "cuda")
    assert row.startswith(f"    128: Tile(128, 128, num_stages={others[-1].num_stages}, tma=True, ")
    assert "evidence='H200 2" in row
    assert "num_stages" not in tune.paste(search, [(1.0, others[-1]), (1.01, now)], "cuda")  # the table's: 2


def test_gpu_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])


def test_a_stage_without_time_is_said_and_is_no_fault(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert gpu.main(["--only", "autotuned", "--seconds", "1", "--out", str(tmp_path)]) == 0
    assert "no time was left" in rows.read(tmp_path / "rows.jsonl")[0].note


def test_hugging_face_has_the_memory_that_one_graph_leaves(tmp_path):
    """Of 139 GB a step of L as a graph keeps 71, a second one all but 11 of the rest."""
    groups = []

    class Asked(gpu.Job):
        def time(self, rows, chosen, peers, **_):
            groups.append({"ours", *peers})

    gpu.steps(Asked(Log(tmp_path), 1.0))
    assert {"hugging face", "ours fp8"} <= set.union(*groups)
    assert not [group for group in groups if {"hugging face", "ours fp8"} <= group]


def test_a_hanging_stage_is_ended(tmp_path, monkeypatch):
    log = Log(tmp_path)
    monkeypatch.setattr(gpu, "ended", lambda command, *args, **k: machine.ended(["sleep", "60"], *args, **k))
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    gpu.stage("steps", log, 0.1)
    assert log.failures() == [] and "time limit" in log.rows()[0].note
    monkeypatch.setattr(gpu, "ended", lambda command, *args, **k: machine.ended(["false"], *args, **k))
    gpu.stage("steps", log, 5.0)
    assert "exit code 1" in log.failures()[0]

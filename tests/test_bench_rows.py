"""Rows of a report, and the costs they quote."""

import dataclasses
import re

import pytest
import torch

from bench import cost, rows
from bench.cases import OPS, Case, model_case
from bench.machine import ROOT
from bench.rows import CompileRow, Row, StepRow
from igpt.config import PRESETS

ROW = Row("kernels", "attention", "ours", "bf16", "fwd", B=2, N=1024, H=8, D=64, d=512, device="cpu")
DESIGN = (
    "suite op B N H D d dtype causal direction impl device gpu driver torch triton commit date median_ms p20_ms p80_ms "
    "flops bytes tflops tb_s floor_ms pct_floor err_vs_fp64 eager_err_vs_fp64 ok ratios note"
)
COMPILED = "arch tile regs stack spill_loads spill_stores shared occupancy mma tma waits"


def test_schema_names_what_the_design_promises():
    assert set(DESIGN.split()) <= {f.name for f in dataclasses.fields(Row)}
    assert set(COMPILED.split()) <= {f.name for f in dataclasses.fields(CompileRow)}


def test_rows_survive_a_file(tmp_path):
    wrote = [
        dataclasses.replace(ROW, median_ms=1.5, ratios={"eager": 2.0}, note="a | b"),
        CompileRow("compile", "attention", "attention_forward_kernel", "D64", "sm_90", "M128", "3.7.1", ok=True),
        StepRow("step", "s", 32, 1024, "rows.norm_forward_kernel", False, 48, 1e9, 0.0, 0.2),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(rows.to_json(r) + "\n" for r in wrote))
    assert rows.read(path) == wrote


@pytest.mark.parametrize(
    ("line", "says"), [('{"suite": "kernels", "speed": 1}', "'speed'"), ('{"suite": "step"}', "missing.*'B'")]
)
def test_a_foreign_line_is_refused_by_name(line, says):
    with pytest.raises(ValueError, match=says):
        rows.from_json(line)


def test_cases_are_one_name_for_all_implementations():
    assert ROW.case == "B2 N1024 H8 D64 d512 bf16 fwd"
    assert dataclasses.replace(ROW, impl="eager").case == ROW.case
    assert dataclasses.replace(ROW, causal=False).case != ROW.case


def test_regressions_need_more_than_noise():
    before = [dataclasses.replace(ROW, median_ms=1.0, p20_ms=0.9, p80_ms=1.1)]
    slower = dataclasses.replace(ROW, median_ms=1.5, p20_ms=1.4, p80_ms=1.6)
    noisy = dataclasses.replace(ROW, median_ms=1.5, p20_ms=1.0, p80_ms=2.0)
    (line,) = rows.regressions([slower], before)
    assert "attention" in line and line.endswith("1.50x the earlier time: REGRESSION")
    (line,) = rows.regressions([noisy], before)
    assert line.endswith("1.50x the earlier time")
    assert rows.regressions([dataclasses.replace(slower, N=2304)], before) == []


def test_attention_by_hand():
    # 3 positions, causal: 1 + 2 + 3 pairs; a pair costs 2 D in q k^T and 2 D in p v.
    case = Case("attention", 1, 3, 1, 16)
    assert case.cost() == cost.Cost(6 * 4 * 16, 4 * 3 * 16 * 2 + 3 * 4)
    assert dataclasses.replace(case, causal=False).cost().flops == 9 * 4 * 16
    forward, backward, both = (dataclasses.replace(case, direction=x).cost() for x in ("fwd", "bwd", "fwd+bwd"))
    assert both == forward + backward and backward.flops == 2.5 * forward.flops


def test_linear_and_mlp_by_hand():
    case = Case("norm_linear", 1, 5, 1, 2, "fp32")
    assert case.cost() == cost.Cost(2 * 5 * 2 * 6, (10 + 30 + 12) * 4)
    assert dataclasses.replace(case, direction="bwd").cost() == cost.Cost(2 * 120, (10 + 12 + 30 + 10 + 12) * 4)
    assert dataclasses.replace(case, op="norm_mlp").cost().flops == 2 * 5 * 2 * 8 * 2
    head = dataclasses.replace(case, op="head_loss", dtype="bf16")
    assert head.cost() == cost.Cost(2 * 5 * 2 * 512, (10 + 1024) * 2 + 60)


@pytest.mark.parametrize(("preset", "gigaflops"), [("s", 0.54), ("m", 3.0), ("l", 8.7), ("xl", 42)])
def test_a_step_is_what_the_hardware_notes_say(preset, gigaflops):
    case, config = model_case(preset, 1, 1024, "bf16", "step"), PRESETS[preset]
    assert case.cost().flops / 1024 / 1e9 == pytest.approx(gigaflops, rel=0.01)
    # The model's own count leaves out the product that attention's backward does again.
    again = config.n_layer * 2 * config.width * 1024 * 1025 / 2
    assert case.cost().flops - case.useful() == pytest.approx(again, rel=1e-9)


def test_floor_is_the_slower_of_products_and_bytes():
    roof = cost.Ceilings("x", {"bf16": 1e12}, 1e9)
    assert roof.floor_ms(cost.Cost(2e12, 1), "bf16") == pytest.approx(2000)
    assert roof.floor_ms(cost.Cost(1, 3e9), "bf16") == pytest.approx(3000)
    assert roof.floor_ms(cost.Cost(0, 1e9), "fp32") == pytest.approx(1000)  # no product, so no product ceiling asked


@pytest.mark.parametrize("op", OPS)
def test_every_operation_has_a_cost_and_inputs(op):
    case = Case(op, 1, 16, 1, 16, "fp32", direction="fwd+bwd")
    assert case.cost().bytes > 0
    inputs = case.inputs("meta")
    assert set(case.diff) <= set(inputs) and all(t.is_meta or t.dtype.is_floating_point for t in inputs.values())


def test_launches_count_their_products():
    values = {"HEADS": 2, "D": 16, "N": 3, "IS_CAUSAL": True}
    assert cost.launch("attention_forward_kernel", values).flops == 2 * 6 * 4 * 16
    assert cost.launch("head_loss_kernel", {"T": 2, "V": 3, "d": 4}).flops == 48
    assert cost.launch("table_backward_kernel", {"R": 2, "V": 3, "d": 4}).flops == 48
    assert cost.launch("linear_kernel", {"B": 2, "O": 3, "K": 4}).flops == 48
    assert cost.launch("norm_forward_kernel", {"x": torch.empty(4, 8), "y": None}) == cost.Cost(0, 128)
    packed = torch.empty(2, 3, 8)
    assert cost.moved([packed[:, 0], packed[:, 1]]) == 2 * 2 * 8 * 4 and cost.moved([packed, packed]) == 2 * 3 * 8 * 4


def test_every_kernel_has_its_products_counted():
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert set(re.findall(r"^def (\w+_kernel)\(", text, re.M)) == set(cost.FLOPS)
    with pytest.raises(ValueError, match="unheard_of_kernel"):
        cost.launch("unheard_of_kernel", {})

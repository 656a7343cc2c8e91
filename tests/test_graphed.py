"""A step as a CUDA graph against the same loop without one: losses and weights to the bit; resumption; what is refused.

The graph, its streams and pinned memory are tests/graph_simulator.py's."""

import copy
import gc
import itertools
import math
import types
import weakref

import pytest
import torch

import igpt
from igpt.programs import train
from igpt.training import graphed, muon
from igpt.training.loop import Training
from igpt.training.processes import Processes
from tests import graph_simulator
from tests.children import options
from tests.test_train import agree, curve

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def machine(monkeypatch):
    return graph_simulator.install(monkeypatch)


def build(optimizer="adamw", objective="ar"):
    torch.manual_seed(0)
    model = igpt.ImageGPT.from_preset("tiny", n_ctx=16, n_layer=2, width=32, heads=2, objective=objective)
    torch.nn.init.normal_(model.head, std=0.02)
    how = {"lr": 0.01, "fused": True, "capturable": True}  # fused: the only Adam that takes these on a CPU
    if optimizer == "adamw":
        return model, [torch.optim.AdamW(model.parameters(), weight_decay=0.1, **how)]
    groups = muon.groups(model)
    rest = [p for p in model.parameters() if not any(p is q for group in groups for q in group["params"])]
    return model, [torch.optim.Adam(rest, **how), muon.Muon(groups, 0.01, dtype=torch.float32)]


def batches(steps, B=4, objective="ar"):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(0, 512, (B, 16), generator=generator)
        yield (tokens,) if objective == "ar" else (tokens, torch.rand(B, 16, generator=generator) < 0.3)


def schedules(optimizers):
    return [torch.optim.lr_scheduler.LambdaLR(o, lambda step: math.cos(step / 7)) for o in optimizers]


def loop(model, optimizers, data, accumulate, clip):
    """A loop as one writes it, learning rates in tensors."""
    figures, planned = [], schedules(optimizers)
    for batch in data:
        loss = torch.zeros(())
        for part in zip(*(t.chunk(accumulate) for t in batch)):
            value = model.loss(*part) / accumulate
            value.backward()
            loss += value.detach()
        norm = torch.nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]],
                                              clip or math.inf)  # fmt: skip
        for optimizer, schedule in zip(optimizers, planned):
            rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"])
            optimizer.step()
            optimizer.zero_grad()
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate
            schedule.step()
        figures.append(torch.stack([loss, norm]))
    return figures


@pytest.mark.parametrize(
    "optimizer, objective, accumulate, clip",
    [("adamw", "ar", 1, None), ("adamw", "bert", 2, 0.3), ("muon", "ar", 4, 0.3), ("muon", "bert", 1, 0.3)],
)
def test_replayed_steps_are_the_loop_s_to_the_bit(machine, optimizer, objective, accumulate, clip):
    model, optimizers = build(optimizer, objective)
    want = loop(model, optimizers, batches(8, objective=objective), accumulate, clip)
    ours, optimizers = build(optimizer, objective)
    calls = []

    def loss(*part):
        calls.append(part)
        return ours.loss(*part)

    step, planned = igpt.graphed(loss, optimizers, accumulate=accumulate, clip=clip), schedules(optimizers)
    got = []
    for batch in batches(8, objective=objective):
        got.append(step(*batch))
        assert all(p.grad is None for p in ours.parameters())
        for schedule in planned:
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))
    assert len({float(loss) for loss, _ in got}) == 8 and len(calls) == 3 * accumulate
    assert machine.log.count("replay on main") == 6


def test_the_next_batch_comes_on_the_side_stream(machine):
    model, optimizers = build()
    step = igpt.graphed(model.loss, optimizers)
    lines = []
    for tokens in batches(4):
        machine.log.clear()
        step(*tokens)
        lines.append(list(machine.log))
    brought = ["pin on side", "main waits for side", "copy on main", "event on main"]
    step_by_itself = ["side waits for main", "copy on side", "main waits for side"]
    assert lines[0] == ["side waits for the event of nothing", *brought, *step_by_itself]
    assert lines[1] == ["side waits for the event of main", *brought, *step_by_itself]
    assert lines[2][1:7] == [*brought, "capture on side", "copy on side"] and "replay on main" in lines[2]
    assert lines[3][:6] == ["side waits for the event of main", *brought, "replay on main"]


def test_gradients_left_by_others_are_not_added(machine):
    (model, optimizers), (probed, others) = build(), build()
    steps = igpt.graphed(model.loss, optimizers), igpt.graphed(probed.loss, others)
    for (tokens,), (other,) in zip(batches(6), batches(6)):
        probed.loss(other.flip(0) * 0).backward()
        assert torch.equal(steps[0](tokens), steps[1](other))


def captured(loss=None, **options):
    model, optimizers = build()
    step = igpt.graphed(loss or model.loss, optimizers, **options)
    for batch in batches(3):
        step(*batch)
    return model, optimizers, step, next(batches(1))


def test_another_batch_is_refused(machine):
    *_, step, (tokens,) = captured(accumulate=2)
    for batch in ((tokens[:2],), (tokens.int(),), (tokens, tokens), (), (tokens[0],)):
        with pytest.raises(ValueError, match=r"batch: got .*, expected \['torch.int64 \(4, 16\)'\] as in the first"):
            step(*batch)
    step(tokens)
    fresh = igpt.graphed(lambda x: x, build()[1], accumulate=3)
    for batch in ((tokens,), (), (torch.tensor(1),), (3,)):
        with pytest.raises(ValueError, match=r"batch: got .*, expected tensors of a multiple of 3 rows"):
            fresh(*batch)


def converted(model, optimizers):
    model.to(torch.bfloat16)


def assigned(model, optimizers):
    model.wte.data = model.wte.data.clone()


def loaded(model, optimizers):
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))


def other_betas(model, optimizers):
    optimizers[0].param_groups[0]["betas"] = 0.5, 0.9


def another_group(model, optimizers):
    optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize(
    "change, named",
    [
        (converted, "parameters"), (assigned, "parameters"), (loaded, "optimizers' state"),
        (other_betas, "optimizers' options"), (another_group, "parameters"),
    ],
)  # fmt: skip
def test_what_changes_under_a_graph_is_refused(machine, change, named):
    model, optimizers, step, batch = captured()
    model.load_state_dict(model.state_dict())  # in place: that is fine
    step(*batch)
    change(model, optimizers)
    with pytest.raises(ValueError, match=f"^{named}: not what the graph was captured with: .* call igpt.graphed again"):
        step(*batch)


def test_a_checkpoint_loaded_before_the_first_step_is_fine(machine):
    model, optimizers, step, batch = captured()
    other, others = build()
    resumed = igpt.graphed(other.loss, others)
    other.load_state_dict(model.state_dict())
    others[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for batch in batches(5):
        assert torch.equal(step(*batch), resumed(*batch))


def test_a_loss_that_reads_the_host(machine):
    (model, optimizers), (other, others), told, calls = build(), build(), [], itertools.count()

    def reading(tokens):
        """In the second micro-batch: the first one has left gradients."""
        return model.loss(tokens) * (1.0 if next(calls) % 2 == 0 or tokens.max().item() > 0 else 2.0)

    step, data = igpt.graphed(reading, optimizers, accumulate=2), list(batches(6))
    want = loop(other, others, data, 2, None)
    (schedule,), got = schedules(optimizers), []
    for batch in data[:2]:
        got.append(step(*batch))
        schedule.step()
    with pytest.raises(graphed.CaptureError, match=r"not permitted when stream is capturing\); most often the loss"):
        step(*data[2])
    assert machine.current.name == "main" and all(p.grad is None for p in model.parameters())
    assert isinstance(optimizers[0].param_groups[0]["lr"], float)
    step.otherwise = told.append
    for batch in data[2:]:
        got.append(step(*batch))
        schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(told) == 1 and machine.log.count("capture on side") == 2


def test_a_broken_capture_s_memory_is_free_at_once(machine):
    """On a GPU it can be all there is: nothing may wait for the garbage collector."""
    (model, optimizers), kept = build(), []

    def reading(tokens):
        loss = model.loss(tokens)
        kept.append(weakref.ref(loss))
        return loss * loss.item()

    step = igpt.graphed(reading, optimizers, otherwise=lambda why: None)
    gc.disable()
    try:
        for batch in batches(3):
            step(*batch)
        assert kept[2]() is None  # of the capture
    finally:
        gc.enable()


def test_an_error_of_the_loss_s_own_stays_what_it_is(machine):
    calls = itertools.count()
    model, optimizers = build()

    def loss(tokens):
        if next(calls) == 2:
            raise ValueError("mine")
        return model.loss(tokens)

    step = igpt.graphed(loss, optimizers)
    with pytest.raises(ValueError, match="mine"):
        for batch in batches(3):
            step(*batch)
    assert machine.current.name == "main"


def test_bad_arguments(machine, monkeypatch):
    model, optimizers = build()
    for bad, said in (({"accumulate": 0}, "got 0, None"), ({"clip": 0.0}, "got 1, 0.0")):
        with pytest.raises(ValueError, match=said):
            igpt.graphed(model.loss, optimizers, **bad)
    with pytest.raises(ValueError, match="got Adam with capturable=False, expected capturable=True"):
        igpt.graphed(model.loss, torch.optim.Adam(model.parameters(), fused=True))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="got Parameter on cpu, expected parameters on one GPU"):
        igpt.graphed(model.loss, optimizers)


def test_figures_are_read_without_waiting_for_later_steps(monkeypatch):
    log = []
    event = types.SimpleNamespace(record=lambda: log.append("record"), synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    here = torch.tensor([1.0, 2.0])
    device, copied = torch.device("cuda"), lambda where, non_blocking: log.append(where) or here
    figures = types.SimpleNamespace(device=device, to=copied)
    read = graphed.to_host(figures)
    log.append("next step")
    assert read() == [1.0, 2.0] and log == ["cpu", "record", "next step", "wait"]
    assert graphed.to_host(here)() == [1.0, 2.0]


@pytest.mark.parametrize("changes", [{"objective": "bert", "accumulate": 2}, {"optimizer": "muon", "clip": 0.1}])
def test_igpt_train_graphed_eager_and_resumed_are_one_run(machine, monkeypatch, tmp_path, changes):
    """Eager is the same step on the same stand-in, never captured."""

    def run(name, eager=False, until=None):
        with monkeypatch.context() as patched:
            patched.setattr(graphed, "WARM_UP", math.inf if eager else 2)
            report = Training.report
            patched.setattr(Training, "report", lambda self, at, said: report(self, at, said) or at == until)
            machine.log.clear()
            train.run(options(tmp_path / name, **changes))
            assert eager == ("replay on main" not in machine.log)
            return curve(tmp_path / name)

    want = run("eager", eager=True)
    assert run("graphed") == want
    run("mixed", until=4)
    run("mixed", eager=True, until=8)
    assert run("mixed") == want


def test_a_run_moves_between_machines(machine, monkeypatch, tmp_path):
    """A CPU's Adam keeps no capturable state: a graph takes its checkpoint up all the same, and gives one back."""
    stops, seen = [], []

    def report(self, at, figures, stop=Training.report):
        seen[-1].update((group["fused"], group["capturable"]) for o in self.optimizers for group in o.param_groups)
        return stop(self, at, figures) or at == stops[-1]

    monkeypatch.setattr(Training, "report", report)
    for gpu, stop in ((False, 4), (True, 8), (False, None)):
        monkeypatch.setattr(graphed, "possible", lambda device, gpu=gpu: gpu)
        stops.append(stop), seen.append(set())
        train.run(options(tmp_path / "moved"))
    assert seen == [{(False, False)}, {(True, True)}, {(False, False)}] and "replay on main" in machine.log
    train.run(options(tmp_path / "stayed"))
    assert agree(curve(tmp_path / "moved"), curve(tmp_path / "stayed"))


def test_igpt_train_says_once_why_it_has_no_graph(machine, monkeypatch, tmp_path, capsys):
    loss = igpt.ImageGPT.loss
    monkeypatch.setattr(igpt.ImageGPT, "loss", lambda *args: loss(*args) * (1 + 0 * loss(*args).item()))
    train.run(options(tmp_path / "run"))
    assert capsys.readouterr().err.count("no CUDA graph of a step: the step could not be captured") == 1
    two = Processes(0, 2, torch.device("cpu"))
    graphed.stepper(None, [], 1, None, two, None)
    assert "FSDP2 shards the model over 2 processes" in capsys.readouterr().err

"""CUDA graphs, streams and pinned memory on a CPU, for the code that uses them.

What runs under torch.cuda.graph is recorded, operation by operation, and leaves no trace in memory that was there
before; a replay runs the recorded operations on the recorded tensors. So Python that a replay would have to run again,
or a value that is not in a tensor, shows in the results. Reading a tensor from the host fails as a GPU fails, after
which the end of the capture fails too, and the capture's stream stays the current one.

`log` has pins, copies, waits, captures and replays in their order, each with its stream.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from igpt.kernels import checks
from igpt.training import graphed

HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def alias(value):
    return tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, value)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.broken = [], {}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in HOST_READS:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        given = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for t in tree_leaves(written):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        results = (out,) if len(func._schema.returns) == 1 else out or ()
        fresh = [r for r, returned in zip(results, func._schema.returns) if returned.alias_info is None]
        self.calls.append((func, alias(args), alias(kwargs), alias(fresh)))
        return out

    def undo(self):
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, kept in self.calls:
            out = func(*args, **kwargs)
            results = (out,) if len(func._schema.returns) == 1 else out or ()
            fresh = [r for r, returned in zip(results, func._schema.returns) if returned.alias_info is None]
            for place, value in zip(tree_leaves(kept), tree_leaves(fresh), strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)


class Machine:
    """Installed by `install`."""

    def __init__(self):
        machine, self.log = self, []

        class Stream:
            def __init__(self, device, name="side"):
                self.name = name

            def wait_stream(self, other):
                machine.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                machine.log.append(f"{self.name} waits for the event of {event.stream}")

        class Event:
            stream = "nothing"

            def record(self, stream):
                self.stream = stream.name
                machine.log.append(f"event on {stream.name}")

        class CUDAGraph:
            def replay(self):
                machine.log.append(f"replay on {machine.current.name}")
                self.recorder.replay()

        class Graph:
            """torch.cuda.graph."""

            def __init__(self, graph, stream, capture_error_mode):
                self.graph, self.stream = graph, stream

            def __enter__(self):
                machine.log.append(f"capture on {self.stream.name}")
                self.former, machine.current = machine.current, self.stream
                self.graph.recorder = Recorder()
                self.graph.recorder.__enter__()

            def __exit__(self, *error):
                self.graph.recorder.__exit__(*error)
                self.graph.recorder.undo()
                if self.graph.recorder.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                machine.current = self.former

        self.current = Stream(None, "main")
        self.fakes = {
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": Graph, "stream": self.stream,
            "current_stream": lambda device: self.current,
        }  # fmt: skip

    @contextmanager
    def stream(self, stream):
        former, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = former


def install(monkeypatch) -> Machine:
    machine, copy = Machine(), torch.Tensor.copy_

    def logged_copy(place, *args, **kwargs):
        machine.log.append(f"copy on {machine.current.name}")
        return copy(place, *args, **kwargs)

    def pinned(t):
        machine.log.append(f"pin on {machine.current.name}")
        return t.clone()

    for name, value in machine.fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", logged_copy)
    monkeypatch.setattr(graphed, "possible", lambda device: True)
    monkeypatch.setattr(checks, "integers", lambda *_: None)  # reads ids from the host, but only a CPU's
    return machine

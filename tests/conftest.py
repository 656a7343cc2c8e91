"""Without a GPU the kernels run in Triton's interpreter: decided before anything imports Triton."""

import os

# Parallel test workers and the processes they start share few cores: numpy's products take one thread each, and threads
# of OpenMP that wait for others sleep, where spinning took most of a training run. Read when the libraries are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# torch threads of parallel test workers fight over the cores.
torch.set_num_threads(int(os.environ.get("IGPT_TEST_THREADS", "1")))
# torch keeps what a device context redirects as it finds it at the first one: that must not be while a test has another
# torch.empty in place, or "meta" models take real memory from then on (iGPT-XL's 27 GB).
with torch.device("meta"):
    assert torch.empty(1).is_meta

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poison_empty(monkeypatch):
    """torch.empty gives NaN (or the largest integer), so that an output element never written shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(name):
        def empty(*args, **kwargs):
            t = real[name](*args, **kwargs)
            if t.device.type != "meta":
                if t.is_floating_point():
                    t.fill_(float("nan"))
                else:
                    t.fill_(True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)
            return t

        return empty

    for name in real:
        monkeypatch.setattr(torch, name, poisoned(name))


def pytest_terminal_summary(terminalreporter):
    """What tests counted, left with record_property("count", ...): quiet runs and parallel workers print it too."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "count":
                terminalreporter.write_line(f"{report.nodeid}: {value}")

"""Throughput of `igpt sample` and `igpt complete`: how many pictures at once, and who writes them."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from igpt import ImageGPT, Palette, sample
from igpt.kernels import choose
from igpt.programs import complete
from igpt.programs import sample as program
from igpt.programs.writing import Writer
from igpt.sample import decoder as decode


def tiny() -> ImageGPT:
    """Of 4 x 4 pictures in 8 colours, with a head that has opinions."""
    model = ImageGPT.from_preset("tiny", n_ctx=16, vocab=8, width=32, heads=2, n_layer=2)
    with torch.no_grad():
        model.head.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def checkpoint(tmp_path):
    tiny().save_pretrained(tmp_path)
    Palette(torch.cartesian_prod(*3 * [torch.tensor([-1.0, 1.0])])).save(tmp_path / "palette.npy")
    return tmp_path


def test_the_batch_is_chosen_by_memory(monkeypatch):
    """As many as BATCHES says, in equal parts, or what fits; what somebody asks for is only split evenly."""
    model = tiny()
    each = model.config.n_ctx * (model.kv_bytes_per_token(4) + 12 * model.config.width * 4)
    room = 4 * model.num_parameters()
    assert sample.batch_of(model, 5) == 5 and sample.batch_of(model, 33) == 17 and sample.batch_of(model, 1000) == 32
    assert sample.batch_of(model, 17, 4) == 4 and sample.batch_of(model, 9, 4) == 3
    monkeypatch.setattr(decode, "available_bytes", lambda device: int((room + 6 * each) / 0.9) + 8)
    with pytest.warns(UserWarning, match="batch: 6 at once, as memory allows, not 32"):
        assert sample.batch_of(model, 1000) == 6
    with pytest.warns(UserWarning, match="batch: 6 at once, as memory allows, not 10"):
        assert sample.batch_of(model, 10) == 5
    assert sample.batch_of(model, 6) == 6 and sample.batch_of(model, 1000, 100) == 100
    each = model.config.n_ctx * (model.kv_bytes_per_token(1) + 12 * model.config.width * 2)
    less = 2 * model.num_parameters() + 6 * each
    monkeypatch.setattr(decode, "available_bytes", lambda device: int(less / 0.9) + 8)
    assert sample.batch_of(model, 6, weights="int8", cache_dtype="fp8") == 6
    monkeypatch.setattr(decode, "available_bytes", lambda device: 0)
    with pytest.warns(UserWarning, match="batch: 1 at once"):
        assert sample.batch_of(model, 2) == 1
    with pytest.raises(ValueError, match="cache_dtype"):
        sample.batch_of(model, 2, cache_dtype="int8")


def test_programs_choose_around_a_small_memory_and_refuse_what_is_asked(checkpoint, monkeypatch):
    def pixels(name, **how):
        program.run(program.Options(str(checkpoint), n=7, scale=1, out=checkpoint / name, **how))
        return np.asarray(Image.open(checkpoint / name))

    whole, model = pixels("whole.png"), ImageGPT.from_pretrained(checkpoint)
    each = model.config.n_ctx * (model.kv_bytes_per_token(4) + 12 * model.config.width * 4)
    available = int((4 * model.num_parameters() + 3 * each) / 0.9) + 8
    monkeypatch.setattr(decode, "available_bytes", lambda device: available)
    with pytest.warns(UserWarning, match="batch: 3 at once, as memory allows, not 7"):
        assert np.array_equal(pixels("parts.png"), whole)
    monkeypatch.setattr(decode, "available_bytes", lambda device: model.config.n_ctx * model.kv_bytes_per_token(4))
    with pytest.raises(ValueError, match=r"batch: got 4, whose cache needs .* a batch of 1 at most"):
        pixels("never.png", batch=4)


def test_pictures_are_written_while_others_are_drawn():
    """One slow write meanwhile: the next one has all that came, and the end waits for it."""
    seen, began, go_on = [], threading.Event(), threading.Event()

    def write(tokens):
        began.set()
        assert threading.current_thread() is not threading.main_thread() and go_on.wait(60)
        seen.append(tokens.tolist())

    with Writer(write) as writer:
        writer.put(torch.tensor([0, 1]))
        assert began.wait(60) and not seen  # it has the first, and we go on
        writer.put(torch.tensor([2]))
        writer.put(torch.tensor([3]))
        go_on.set()
    assert seen == [[0, 1], [0, 1, 2, 3]] and not writer.thread.is_alive()


def test_what_goes_wrong_in_the_writer_is_raised():
    def write(tokens):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Writer(write) as writer:
        writer.put(torch.zeros(1))
        writer.thread.join(60)
        writer.put(torch.zeros(1))
        pytest.fail("the second put should have raised")
    with pytest.raises(OSError, match="no space left"), Writer(write) as writer:
        writer.put(torch.zeros(1))
    with pytest.raises(KeyError), Writer(write) as writer:  # what went wrong first is what is told
        writer.put(torch.zeros(1))
        raise KeyError


@pytest.mark.parametrize("what", ["sample", "complete"])
def test_ctrl_c_keeps_what_is_drawn(checkpoint, monkeypatch, what):
    """The third part is interrupted: the pictures of two are in the file, the rest of the grid is not."""
    Image.new("RGB", (4, 4)).save(checkpoint / "a.png")
    if what == "sample":
        module, options = program, program.Options(str(checkpoint), n=6, batch=2, columns=2, scale=1)
    else:
        files = (checkpoint / "a.png",) * 3
        module, options = complete, complete.Options(str(checkpoint), pictures=files, completions=2, batch=2, scale=1)
    options = dataclasses.replace(options, out=checkpoint / "out.png")
    module.run(options)
    whole = np.asarray(Image.open(options.out))
    name = {"sample": "generate", "complete": "complete"}[what]
    real, calls = getattr(module, name), []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    options.out.unlink()
    with pytest.raises(KeyboardInterrupt):
        module.run(options)
    assert np.array_equal(np.asarray(Image.open(options.out)), whole[: 2 * 6 + 2])
    assert not list(checkpoint.glob("*.part"))


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_weights_are_packed_where_that_is_quicker(monkeypatch, vendor, batch):
    monkeypatch.setattr(choose, "processor", lambda: vendor)
    model, is_quicker = tiny(), vendor == "AuthenticAMD" or batch == 4
    assert sample.decoder_of(model, batch).layers[0].qkv.packed == (choose.HAS_ONEDNN and is_quicker)
    assert sample.decoder_of(model, batch, weights="bf16").layers[0].qkv.packed == choose.HAS_ONEDNN
    tokens = torch.randint(8, (batch, 16), generator=torch.Generator().manual_seed(1))
    nll = model.nll(model.trunk(tokens), tokens)
    torch.testing.assert_close(-sample.log_likelihood(model, tokens), nll.detach(), rtol=1e-5, atol=1e-5)

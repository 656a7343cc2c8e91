"""Our directory kernels/ beside Hugging Face's package of that name, which transformers imports when it is installed.

A kernels/__init__.py in the repository's root would shadow theirs there and break `import transformers`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import igpt.kernels

ROOT = Path(__file__).parent.parent
# In the window of versions that transformers 5.17 imports from, and the one package of its own that it imports.
THEIRS = ("kernels==0.16.2", "kernels-data")
PROGRAM = """
import sys, torch, transformers, igpt, kernels
import igpt.kernels.reference
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
config = ImageGPTConfig(n_layer=1, n_embd=32, n_head=2, n_positions=8, vocab_size=9)
model = ImageGPTForCausalImageModeling(config).eval()
tokens = torch.arange(8)[None]
logits = model(tokens).logits
assert logits.shape == (1, 8, 8)
igpt.hf.apply_igpt_kernels(model)
assert torch.allclose(model(tokens).logits, logits, atol=1e-5)
assert hasattr(kernels, "CUDAProperties") == (sys.argv[1] == "theirs"), kernels
print("works")
"""


def run(path: Path | str) -> str:
    """From the root, with theirs on the path."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, "theirs"], cwd=ROOT, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    return done.stdout.strip() or done.stderr


@pytest.fixture(scope="module")
def theirs(pytestconfig) -> Path:
    """A directory with their package and none of what it depends on, kept between runs."""
    place = Path(pytestconfig.cache.mkdir(THEIRS[0].replace("==", "-")))
    if not (place / "kernels_data").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), *THEIRS]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip found no {THEIRS[0]}: {done.stderr.strip().splitlines()[-1]}")
    return place


def test_there_is_no_package_in_the_way():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert list(igpt.kernels.__path__) == [str(ROOT / "kernels")]


def test_from_the_root_without_theirs(monkeypatch, capsys):
    """This process has the root on its path too."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", ["", "ours"])
    exec(PROGRAM, {})
    assert capsys.readouterr().out == "works\n"


def test_from_the_root_with_theirs(theirs, tmp_path):
    pytest.importorskip("transformers")
    assert run(theirs) == "works"
    # What this file guards against: with a package of ours in front of theirs, transformers fails.
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    assert "CUDAProperties" in run(f"{tmp_path}{os.pathsep}{theirs}")

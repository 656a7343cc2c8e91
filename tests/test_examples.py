"""The examples run, on whatever is here, and learn."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_nanogpt_learns_its_sentence():
    first, last = runpy.run_path(str(EXAMPLES / "nanogpt_attention.py"))["main"](steps=40)
    assert first > 3 and last < 1

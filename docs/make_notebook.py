"""Makes tutorial.ipynb of tutorial.md: `python docs/make_notebook.py`. Fences marked `not-run` stay text there."""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
FENCE = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.M | re.S)


def parts(markdown: str) -> list[tuple[str, str]]:
    """The text in order: ("markdown", ...), and what is run, ("bash", ...) and ("python", ...)."""
    text, *fences = FENCE.split(markdown)
    found = [("markdown", text)]
    for kind, code, text in zip(fences[::3], fences[1::3], fences[2::3]):
        found += [(kind, code), ("markdown", text)]
    return [(kind, content.strip("\n")) for kind, content in found if content.strip()]


def cell(kind: str, content: str) -> dict:
    source = (f"%%bash\n{content}" if kind == "bash" else content).splitlines(keepends=True)
    if kind == "markdown":
        return {"cell_type": "markdown", "metadata": {}, "source": source}
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source}


def notebook(markdown: str) -> str:
    """The .ipynb of a tutorial, as JSON."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = {
        "cells": [cell(*part) for part in parts(markdown)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    text = (HERE / "tutorial.md").read_text(encoding="utf-8")
    (HERE / "tutorial.ipynb").write_text(notebook(text), encoding="utf-8")

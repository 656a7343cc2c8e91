"""docs/tutorial.md as a test: what it says to run is run, smaller; its tables are what is there; its notebook is it."""

import fnmatch
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igpt.programs import cli

ROOT = Path(__file__).parent.parent
MAKER = runpy.run_path(str(ROOT / "docs" / "make_notebook.py"))
TEXT = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SMALLER = {  # as written: as run here
    "zip(emoji.images, emoji.labels)": "zip(emoji.images[::8], emoji.labels[::8])",
    "--size 16": "--size 8",
    "--k 512": "--k 64",
    "--steps 2000": "--steps 30 --layers 2 --width 64",
    "--n 32": "--n 8",
    "probe --model": "probe --C 0.1 --model",
    "sleep 60; kill -9 $!": "kill -9 $!",  # as soon as there is a checkpoint
}
RUN = Path("runs/mine")


def smaller(code: str) -> str:
    for written, run in SMALLER.items():
        code = code.replace(written, run)
    return code


def words(line: str) -> list[str]:
    """A command's words as bash reads them."""
    script = f'igpt() {{ printf "%s\\0" "$@"; }}\n{line}'
    return subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True).stdout.decode().split("\0")[:-1]


def killed(line: str) -> None:
    """A command in the background until it has saved a checkpoint."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["nice", sys.executable, "-m", "igpt", *words(line)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while child.poll() is None and not any(RUN.glob("checkpoints/step-*/files.json")):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -9, child.stderr.read().decode()


def run_bash(code: str, capsys) -> dict[str, dict]:
    """A block, line by line: igpt's commands here, which saves their start, all else by bash. {command: its JSON}"""
    lines, reports = iter(code.splitlines()), {}
    for line in lines:
        if line.endswith("&"):
            assert next(lines) == "kill -9 $!"
            killed(line.removesuffix("&"))
        elif line.startswith("igpt "):
            argv = words(line)
            assert cli.main(argv) == 0, (line, capsys.readouterr().err)
            reports[argv[0]] = json.loads(capsys.readouterr().out.splitlines()[-1])
        else:
            subprocess.run(["bash", "-ec", line], check=True)
    return reports


def first_column(heading: str) -> set[str]:
    """What stands in backquotes in the first column of the table under a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?`) \|", section, re.M)
    return {name for row in cells for name in re.findall("`(.*?)`", row)}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reports, names = {}, {}
    for kind, code in MAKER["parts"](TEXT):
        if kind == "python":
            exec(compile(smaller(code), "tutorial.md", "exec"), names)
        elif kind == "bash":
            reports |= run_bash(smaller(code), capsys)
    assert list(reports) == ["palette", "encode", "train", "probe", "eval", "complete", "sample", "convert"]
    steps = [row["step"] for row in names["rows"]]
    assert steps == sorted([1, 10, 20, 30, *range(3, 31, 3)]), "one run, whatever the kill: no step is missing or twice"
    assert reports["train"]["valid_loss"] < names["rows"][0]["loss"]
    assert len(names["model"].palette) == 64
    assert first_column("How to read metrics.jsonl") == {name for row in names["rows"] for name in row}
    files = {str(p.relative_to(RUN)) for p in RUN.rglob("*") if p.is_file() and "probe" not in p.parts}
    listed = first_column("What each file in a run is")
    unlisted = {file for file in files if not any(fnmatch.fnmatch(file, name) for name in listed)}
    assert not unlisted and all(fnmatch.filter(files, name) for name in listed)
    assert Path("completions.png").is_file() and Path("samples.png").is_file()


def test_every_smaller_number_stands_in_the_tutorial():
    for written in SMALLER:
        assert any(written in code for kind, code in MAKER["parts"](TEXT) if kind != "markdown"), written


def test_the_notebook_is_the_tutorial():
    """`python docs/make_notebook.py` makes it anew."""
    made = (ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8")
    assert made == MAKER["notebook"](TEXT)
    cells = json.loads(made)["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    assert not any("not-run" in "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")

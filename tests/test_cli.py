"""The command line: a frozen surface, help for every command, one JSON line at the end, one line for a mistake.

A wanted change of the surface: `python -m tests.test_cli` writes it anew."""

import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import igpt
from igpt.programs import cli

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SURFACE = Path(__file__).with_name("cli_surface.txt")


def options_of(command: str) -> type:
    return importlib.import_module(f"igpt.programs.{command}").Options


def surface() -> str:
    """A line for each option of each command: its type and default."""
    lines = []
    for command in cli.COMMANDS:
        hints = typing.get_type_hints(options_of(command))
        for field in dataclasses.fields(options_of(command)):
            kind = getattr(hints[field.name], "__name__", None) if isinstance(hints[field.name], type) else None
            default = "required" if field.default is dataclasses.MISSING else f"= {field.default!s}"
            kind = (kind or str(hints[field.name])).replace("pathlib.", "").replace("typing.", "")
            lines.append(f"{command} --{field.name.replace('_', '-')}: {kind} {default}")
    return "\n".join(lines) + "\n"


def test_the_surface_is_frozen():
    assert surface() == SURFACE.read_text()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"usage: igpt {command}" in said and options_of(command).__doc__.split()[0] in said
    for field in dataclasses.fields(options_of(command)):
        assert f"--{field.name.replace('_', '-')}" in said
    assert "(default: " in said


def test_options_are_frozen_dataclasses():
    for command in cli.COMMANDS:
        assert options_of(command).__dataclass_params__.frozen, command


def test_help_is_quick_and_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in cli.COMMANDS)
    code = "import sys; from igpt.programs import cli; cli.main(['--help']); "
    code += "assert not {'torch', 'tyro', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_command_ends_with_one_json_line(capsys):
    assert cli.main(["info", "--preset", "xl", "--gpus", "8"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    assert [plan["gpus"] for plan in result["plan"]] == [1, 2, 4, 8] and result["config"]["n_ctx"] == 4096
    assert said.err == ""


@pytest.mark.parametrize(
    "argv, said",
    [
        (["info", "--gpus", "0"], "igpt info: gpus: got 0"),
        (["train", "--run", "x", "--data", "nowhere"], "nowhere"),
        (["eval", "--model", "no/where/at-all", "--data", "builtin:emoji"], "no/where/at-all"),
        (["palette", "--data", "builtin:emoji", "--out", "/nowhere/palette.npy"], "/nowhere/palette.npy"),
        (["invent"], "unknown command 'invent', expected one of info, palette"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    assert said in told.err and len(told.err.splitlines()) == 1 and told.out == ""
    assert not any(tmp_path.iterdir())


def test_the_line_is_json_whatever_the_figures(capsys, monkeypatch):
    """NaN is no JSON: a strict reader would refuse the line."""
    result = {"loss": float("nan"), "rows": [1.5, float("-inf")], "k": {"4": 2}}
    monkeypatch.setattr(importlib.import_module("igpt.programs.info"), "run", lambda options: result)
    assert cli.main(["info"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out, parse_constant=pytest.fail) == {"loss": None, "rows": [1.5, None], "k": {"4": 2}}
    assert said.err == "igpt info: got NaN, -Infinity, null in the line above\n"


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("igpt.programs.info"), "run", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr() == ("", "\nigpt info: stopped\n")


def test_a_mistyped_option_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", "--preset", "huge"])
    assert stopped.value.code == 2 and "huge" in capsys.readouterr().err


def test_a_training_that_went_wrong_is_exit_code_1(capsys, tmp_path):
    argv = "--preset tiny --layers 1 --width 32 --size 8 --batch 4 --steps 9 --sample-every 0 --device cpu"
    argv += " --lr 1e30 --warmup 0 --clip None"
    assert cli.main(["train", "--run", str(tmp_path / "run"), *argv.split()]) == 1
    assert "igpt train: step 2: loss" in (said := capsys.readouterr().err) and "the last good checkpoint is" in said


def test_palette_then_encode_then_train(capsys, tmp_path):
    """The commands feed each other: pictures -> palette -> tokens -> model -> evaluation."""
    for part in ("train", "valid"):
        images = igpt.data.load("builtin:emoji", part).images[:24]
        for i, image in enumerate(images):
            path = tmp_path / "pictures" / part / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)

    def command(*argv) -> dict:
        assert cli.main([str(a) for a in argv]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    pictures, palette, tokens, run = (tmp_path / name for name in ("pictures", "palette.npy", "tokens", "run"))
    assert command("palette", "--data", pictures, "--k", 16, "--size", 8, "--out", palette)["valid_mse"] > 0
    encoded = command(
        "encode", "--source", pictures, "--out", tokens, "--palette", palette, "--size", 8, "--workers", 0
    )
    assert encoded["pictures"] == {"train": 24, "valid": 24}
    trained = command(
        "train", "--run", run, "--data", tokens, "--preset", "tiny", "--layers", 1, "--width", 32, "--batch", 4,
        "--steps", 3, "--sample-every", 0, "--device", "cpu",
    )  # fmt: skip
    judged = command("eval", "--model", trained["export"], "--data", tokens, "--split", "valid", "--device", "cpu")
    assert judged["nats_per_pixel"] == pytest.approx(trained["valid_loss"], abs=1e-5)
    converted = command("convert", "--source", trained["export"], "--out", tmp_path / "hf", "--format", "hf")
    assert converted["format"] == "hf" and (tmp_path / "hf" / "preprocessor_config.json").is_file()


def test_the_demo_needs_no_extra_and_writes_where_it_is_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["demo", "--minutes", "0.001", "--size", "8"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 20 and [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert Image.open(result["completions"]).width == 12 * (2 + 8) * 12 + 24
    red, _, blue = np.asarray(Image.open(result["curve"])).reshape(-1, 3).astype(int).T
    assert (red - blue > 60).sum() > 100 and (blue - red > 60).sum() > 100  # both lines


if __name__ == "__main__":
    SURFACE.write_text(surface())

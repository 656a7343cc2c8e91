"""Installed from a wheel, from an unpacked sdist, and from a checkout: the kernels are found, the commands run."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import igpt

ROOT = Path(__file__).parent.parent
# Found, not imported: importing takes torch two seconds each time, and the wheel's commands do it.
KERNEL = "import igpt, importlib.util as u; print(igpt.__file__); print(u.find_spec('igpt.kernels.attention').origin)"


def run(*command, cwd: Path, **env) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def build(source: Path, out: Path, kind: str) -> Path:
    """By setuptools as it is installed here: nothing is downloaded."""
    out.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What an archive of the repository holds, and no symbolic link, which not every machine unpacks."""
    place = tmp_path_factory.mktemp("checkout") / "igpt-main"
    for name in ("igpt", "kernels"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    assert not any(path.is_symlink() for path in place.rglob("*"))
    return place


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """A source distribution, unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(checkout, place / "dist", "sdist")) as archive:
        archive.extractall(place, filter="data")
    (folder,) = (p for p in place.iterdir() if p.name.startswith("igpt-"))
    return folder


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory) -> Path:
    """The python of a fresh environment with the wheel that the sdist makes."""
    place = tmp_path_factory.mktemp("env")
    wheel = build(sdist, place / "dist", "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert "igpt/kernels/attention.py" in names
    assert {"igpt/assets/emoji.npz", "igpt/py.typed", "igpt/web/page/page.js"} <= set(names)
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)
    return environment(place, wheel)


def environment(place: Path, *package) -> Path:
    """The python of a fresh environment with a package; torch and the rest come from this one."""
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *package, cwd=place)
    return python


def test_the_wheel_runs_in_a_fresh_environment(installed, tmp_path):
    for path in run(installed, "-c", KERNEL, cwd=tmp_path).splitlines():
        assert str(installed.parents[1]) in path
    for command, asked, told in (
        ([installed.with_name("igpt")], ["--preset", "tiny", "--gpus", "1"], {"preset": "tiny"}),
        ([installed, "-m", "igpt"], ["--model", "builtin:emoji"], {"parameters": 1_049_856}),
    ):
        said = run(*command, "info", *asked, cwd=tmp_path)
        assert told.items() <= json.loads(said.splitlines()[-1]).items()
        assert run(*command, "--version", cwd=tmp_path) == f"igpt {igpt.__version__}\n"


def test_a_script_beside_a_clone_imports_what_is_installed_from_it(checkout, tmp_path):
    """The clone's folder, called igpt, is on the script's path, as a namespace."""
    shutil.copytree(checkout, tmp_path / "igpt")
    python = environment(tmp_path, "--editable", tmp_path / "igpt")
    (tmp_path / "mine.py").write_text(KERNEL)
    for path in run(python, "mine.py", cwd=tmp_path).splitlines():
        assert Path(path).is_relative_to(tmp_path / "igpt")


@pytest.mark.parametrize("source", ["checkout", "sdist"])
def test_the_sources_run_where_they_lie(source, tmp_path, request):
    folder = request.getfixturevalue(source)
    for where, env in ((folder, {}), (tmp_path, {"PYTHONPATH": str(folder)})):
        package, kernel = run(sys.executable, "-c", KERNEL, cwd=where, **env).splitlines()
        assert Path(package).parents[1] == folder and Path(kernel) == folder / "kernels" / "attention.py"
    assert "igpt COMMAND" in run(sys.executable, "-m", "igpt", "--help", cwd=folder)

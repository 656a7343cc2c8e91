"""The house's arrows: every import leads to the same room or to one below it (docs/architecture.md)."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each floor may import those above it in this list. The model offers sampling and checkpoints as its methods, so their
# rooms, which know it only by what they are handed, lie below it.
FLOORS = (
    {"igpt.kernels"}, {"igpt.config", "igpt.machine"}, {"igpt.ops"}, {"igpt.palette"}, {"igpt.data"},
    {"igpt.convert", "igpt.sample"}, {"igpt.model"}, {"igpt.vit"}, {"igpt.hf", "igpt.training", "igpt.web"},
    {"igpt.programs"},
    {"bench"},
)  # fmt: skip
# The package's door, its script, a module's former name, and how the pictures in the box were made.
OUTSIDE = {"igpt", "igpt.__main__", "igpt.crops", "igpt.assets"}


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("kernels", "igpt", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = ("igpt", *parts) if parts[0] == "kernels" else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows() -> dict[str, set[str]]:
    """{module: modules that it imports}, wherever in the file the import stands."""
    there, found = modules(), defaultdict(set)
    for name, path in there.items():
        package = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names] + [base]
            else:
                continue
            found[name] |= {target for target in names if target in there} - {name}
    return found


def room(module: str) -> str:
    return module.split(".")[0] if module.startswith("bench") else ".".join(module.split(".")[:2])


def test_no_arrow_leads_up():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    seen = set()
    for module, targets in arrows().items():
        here = room(module)
        seen.add(here)
        if here in OUTSIDE:
            continue
        for target in targets - OUTSIDE:
            there = room(target)
            assert here == there or floor[there] < floor[here], f"{module} imports {target}"
    assert seen - OUTSIDE == set(floor)


def test_no_circle():
    """Between files too. A package's __init__ re-exports its files, which may name it: those count as one."""
    graph = {m: {t for t in targets if not m.startswith(f"{t}.")} for m, targets in arrows().items()}
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in graph.get(module, ()):
                visit(target)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_programs_are_named_as_their_commands():
    from igpt.programs.cli import COMMANDS

    there = {path.stem for path in (ROOT / "igpt" / "programs").glob("*.py")}
    assert set(COMMANDS) <= there


def test_no_file_outgrows_its_topic():
    for path in modules().values():
        lines = len(path.read_text().splitlines())
        assert lines <= 350, (str(path.relative_to(ROOT)), lines)


def test_a_former_name_leads_to_its_module():
    import igpt.crops
    import igpt.data.crops

    assert igpt.crops.open_picture is igpt.data.crops.open_picture

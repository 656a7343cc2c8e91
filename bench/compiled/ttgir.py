"""The text of a binary's ttgir as a tree of operations: what bench/compiled/rings.py runs."""

import re
from collections.abc import Iterator


class Op:
    """One line of ttgir: its name without the dialect (of a comparison, which), results, operands and regions."""

    def __init__(self, text: str):
        left, right = text.split(" = ", 1) if text.startswith("%") else ("", text)
        groups = re.findall(r"(%[\w-]+)(?::(\d+))?", left)
        self.results = [f"{name}#{i}" if n else name for name, n in groups for i in range(int(n or 1))]
        self.name = re.match(r'"?(?:\w+\.)?(?:cmpi [su]?)?([\w.]+)', right)[1]
        head = re.sub(r"\{[^{}]*\}", "", right).split(" -> ")[0].split(" : ")[0]
        self.args, self.regions = re.findall(r"%[\w#-]+", head), []
        number = re.search(r"(?:, |constant )(-?\d+|true|false)\b", head)
        self.number = int({"true": 1, "false": 0}.get(number[1], number[1])) if number else None
        types = re.findall(r"memdesc<([\dx]+)x[a-z]+(\d+)", text)
        self.shape, self.bits = ([int(n) for n in types[-1][0].split("x")], int(types[-1][1])) if types else ([], 0)
        self.pendings = int((re.search(r"pendings = (\d+)", text) or [0, 0])[1])
        self.is_async = "isAsync = true" in text or "is_async" in text


def parse(ttgir: str) -> list[Op]:
    """The lines of a module as a tree."""
    text = re.sub(r" loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", "", ttgir)
    blocks: list[list[Op]] = [[]]
    for line in map(str.strip, text.splitlines()):
        if line.startswith("}"):
            blocks.pop()
        elif line and line[0] not in "#^":
            blocks[-1].append(Op(line))
        if line.endswith("{"):
            blocks[-1][-1].regions.append([])
            blocks.append(blocks[-1][-1].regions[-1])
    return blocks[0]


def walk(ops: list[Op]) -> Iterator[Op]:
    for op in ops:
        yield op
        for region in op.regions:
            yield from walk(region)

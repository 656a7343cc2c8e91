"""Whether a tile in shared memory is overwritten while an asynchronous product reads it, seen in a binary's ttgir.

`read` runs the integers of the ttgir: loops, the places of rings, mbarriers. A product (Hopper's asynchronous
warp_group_dot, Blackwell's tc_gen5_mma) reads its tiles until the wait that retires it, and a load lands at once: a
load or store that meets a place still read is a finding. So a ring needs a place for each load ahead and each product
left in flight. Triton gives too few to a load that has a product and another use (triton-lang/triton #6691, #7110; of
the same kind #8554, #8139). Partitions of warp_specialize run against each other through their mbarriers, each in turn
held back for as long as another can go on: a place released before its product was waited for is found.

warp_group_dot_wait waits for one warpgroup. With more than 4 warps a place is free only after a barrier of the block
(#9484, #11047, #11056), and those stand in the PTX alone: the innermost loops with products are laid beside those of
the PTX, event by event; outside of them nothing may go to shared memory between a wait and the next barrier.

Plain kernels run with unknown arguments: a loop of unknown length takes 8 rounds, an unknown condition is true. Those
with partitions run with their launch's integers, as program 0. What can't be followed is a finding as well. Not seen:
allocations that share an address (but for the PTX rule), tiles read into registers, loads read before they landed, TMA
stores that still read, and, in PTX outside of loops, any order but that of the text.
"""

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ROUNDS = 8  # more than a ring's places and the products in flight together
INTEGERS = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_, "ori": operator.or_,
    "xori": operator.xor, "minsi": min, "maxsi": max, "divsi": lambda a, b: int(a / b),
    "remsi": lambda a, b: int(math.fmod(a, b)), "extsi": int, "extui": int, "trunci": int,
}  # fmt: skip
VIEWS = ("memdesc_trans", "memdesc_reshape", "memdesc_subslice", "memdesc_reinterpret", "tmem_subslice")
WRITES = ("async_copy_global_to_local", "async_tma_copy_global_to_local", "local_store", "tmem_store")
READS = ("local_load", "local_dealloc", "inval_barrier", "async_tma_copy_local_to_global", "tmem_load")
# A product, a wait, a load, the end of a group of loads, a load by TMA, a store, a barrier of the block.
PTX = re.compile(r"""(?P<M>wgmma\.commit_group)|wgmma\.wait_group\.sync\.aligned\s+(?P<W>\d+)|(?P<C>cp\.async\.c[ag]\.)
    |(?P<E>cp\.async\.commit_group)|(?P<T>cp\.async\.bulk\.tensor\.\dd\.shared::)|(?P<S>st\.shared|stmatrix)
    |(?P<B>bar(?:rier)?(?:\.cta)?\.sync)""", re.X)  # fmt: skip


class Unread(Exception):
    """Something that isn't followed here."""


class Op:
    """One line of ttgir: its name without the dialect, results, operands and regions."""

    def __init__(self, text: str):
        left, right = text.split(" = ", 1) if text.startswith("%") else ("", text)
        self.text, self.regions = text, []
        groups = re.findall(r"(%[\w-]+)(?::(\d+))?", left)
        self.results = [f"{name}#{i}" if n else name for name, n in groups for i in range(int(n or 1))]
        self.name = re.match(r'"?(?:\w+\.)?([\w.]+)', right)[1]
        head = re.sub(r"\{[^{}]*\}", "", right).split(" -> ")[0].split(" : ")[0]
        self.args = re.findall(r"%[\w#-]+", head)
        number = re.search(r"(?:, |constant )(-?\d+$|-?\d+,|true|false)", head)
        self.number = number and {"true": True, "false": False}.get(number[1], number[1])
        self.number = int(self.number.strip(",")) if isinstance(self.number, str) else self.number
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


@dataclass
class Ring:
    """Memory that products read. ahead: loads before the first product; flying: the most products reading it when it
    was written."""

    name: str
    places: int
    ahead: int | None = None
    flying: int = 0
    writes: int = 0
    wrong: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.places} places, {self.ahead} loads ahead, {self.flying} products in flight"


@dataclass(eq=False)
class Thread:
    """A partition. flight: its products as (views, mbarrier, phase); waited: views that no barrier has freed yet."""

    body: Iterator | None = None
    ready: object = None
    flight: list = field(default_factory=list)
    waited: list = field(default_factory=list)


class Run:
    """Runs a function. `last` is the partition that is held back, `inside` and `freed` are what `lay` gives."""

    def __init__(self, function: Op, env: dict, programs: int, last: int, inside: set[Op], freed: set[Op]):
        self.rings, self.bars, self.programs, self.inside, self.freed = {}, {}, programs, inside, freed
        self.threads = [main := Thread()]
        main.body = self.block(function.regions[0], env, main)
        while live := [t for t in self.threads if t.body]:
            ready = [t for t in live if t.ready is None or t.ready()]
            if not ready:
                raise Unread("partitions that wait for each other")
            me = min(ready, key=lambda t: (self.threads.index(t) - last - 1) % len(self.threads))
            me.ready = next(me.body, main)
            if me.ready is main:
                me.body = None

    def block(self, ops: list[Op], env: dict, me: Thread):
        """Runs ops and returns what they yield. Yields where another partition may go on: None or when this one may."""
        for i, op in enumerate(ops):
            a, out = [env.get(x) for x in op.args], []
            if op.name in INTEGERS:
                out = [] if None in a else [INTEGERS[op.name](*a)]
            elif op.name == "constant":
                out = [op.number]
            elif op.name == "cmpi":
                compare = getattr(operator, re.search(r"cmpi [su]?(eq|ne|lt|le|gt|ge)", op.text)[1])
                out = [] if None in a else [compare(*a)]
            elif op.name == "select":
                out = [] if a[0] is None else [a[1] if a[0] else a[2]]
            elif op.name in VIEWS:
                out = a[:1]
            elif op.name in ("get_program_id", "get_num_programs") and self.programs:
                out = [0 if op.name == "get_program_id" else self.programs]
            elif op.name in ("yield", "warp_yield", "warp_return", "return"):
                return a
            elif op.name == "for":
                out = a[5::2]
                for n in [None] * ROUNDS if None in a[1:4] else range(*a[1:4]):
                    env.update(zip(op.args[4::2], out), **{op.args[0]: n})
                    out = yield from self.block(op.regions[0], env, me)
            elif op.name == "if":
                out = yield from self.block([*op.regions, []][0 if a[0] in (None, True) else 1], env, me)
            elif op.name == "warp_specialize":
                for other in ops[i + 1 :]:
                    if other.name.startswith("partition"):
                        self.threads.append(t := Thread())
                        t.body = self.block(other.regions[0], dict(zip(other.args, a)), t)
            elif op.name == "default":
                yield from self.block(op.regions[0], env, me)
            elif not op.name.startswith("partition"):
                out = yield from self.event(op, a, me)
            env.update(dict.fromkeys(op.results))
            env.update(zip(op.results, out))
        return []

    def event(self, op: Op, a: list, me: Thread):
        """Memory, products and mbarriers [count, missing, bytes, phase]."""
        views, rest = [x for x in a if isinstance(x, tuple)], [x for x in a if not isinstance(x, tuple)]
        if op in self.freed:
            me.waited = []
        if op.name in ("local_alloc", "tmem_alloc"):
            name = op.results[0].strip("%")
            ring = self.rings.setdefault(name, Ring(name, op.shape[0] if len(op.shape) > 2 else 1))
            if op.args:
                self.write((ring, None))
            return [(ring, None)]
        if op.name == "call" or op.regions and op.name not in ("reduce", "scan"):
            raise Unread(op.name)
        if not views and op.name != "warp_group_dot_wait" or op.name in READS:
            return []
        if op.name == "memdesc_index":
            if rest[0] is None:
                raise Unread(f"a place of {views[0][0].name} that no integer tells")
            return [(views[0][0], rest[0])]
        at = views and (views[-1][0].name, views[-1][1])
        if op.name in WRITES and rest[-1:] != [False]:
            self.write(views[0])
            if "tma" in op.name:
                self.arrive(at, 0, -math.prod(op.shape) * op.bits // 8)
        elif op.name == "init_barrier":
            self.bars[at] = [op.number, op.number, 0, 0]
        elif op.name == "barrier_expect" and rest != [False]:
            self.arrive(at, 1, op.number)
        elif op.name == "arrive_barrier" and rest != [False]:
            self.arrive(at, op.number)
        elif op.name == "wait_barrier" and rest[1:2] != [False]:
            bar = self.bars[views[0][0].name, views[0][1]]
            yield lambda: bar[3] % 2 != rest[0]
            for t in self.threads:
                done = [i for i, (_, by, phase) in enumerate(t.flight, 1) if by is bar and phase < bar[3]]
                t.flight = t.flight[max(done, default=0) :]
        elif op.name == "warp_group_dot_wait":
            n = max(len(me.flight) - op.pendings, 0)
            me.waited += [v for reads, *_ in me.flight[:n] for v in reads]
            me.waited = me.waited if op in self.inside else []
            me.flight = me.flight[n:]
        elif op.name in ("warp_group_dot", "tc_gen5_mma") and (op.name == "warp_group_dot" or rest[1:2] != [False]):
            reads = [v for v in a[:2] if v in views]
            for ring, _ in reads:
                ring.ahead = ring.writes if ring.ahead is None else ring.ahead
            bar = self.bars.get(at) if op.name == "tc_gen5_mma" else None
            if op.is_async:
                me.flight.append((reads, bar, bar and bar[3]))
            yield None
            if bar:
                self.arrive(at, 1)
        elif op.name not in (*WRITES, "barrier_expect", "arrive_barrier", "wait_barrier", "tc_gen5_mma"):
            raise Unread(op.name)
        yield None
        return []

    def arrive(self, at: tuple, count: int, size: int = 0) -> None:
        bar = self.bars[at]
        bar[1], bar[2] = bar[1] - count, bar[2] + size
        if bar[1:3] == [0, 0]:
            bar[1], bar[3] = bar[0], bar[3] + 1

    def write(self, view: tuple[Ring, int | None]) -> None:
        ring, place = view

        def met(views: list) -> bool:
            return any(r is ring and (p == place or None in (p, place)) for r, p in views)

        products = [reads for t in self.threads for reads, *_ in t.flight]
        ring.writes += 1
        ring.flying = max(ring.flying, sum(any(r is ring for r, _ in reads) for reads in products))
        if any(map(met, products)):
            ring.wrong = "written while a product reads it"
        elif any(met(t.waited) for t in self.threads):
            ring.wrong = ring.wrong or "written after a wait of one warpgroup, without a barrier of the block"


def once(events: list[tuple]) -> list[tuple]:
    """Events (kind, what), loads that follow each other as one."""
    pairs = zip([("", None), *events], events)
    return [event for before, event in pairs if event[0] != before[0] or event[0] not in ("C", "T")]


def lay(function: Op, ptx: str) -> tuple[set[Op], set[Op], list[str]]:
    """The waits of innermost loops, the operations there that a barrier of the block precedes, and findings."""
    labels = {m[1]: m.end() for m in re.finditer(r"^(\$L__BB\w+):", ptx, re.M)}
    jumps = [(labels.get(m[1], len(ptx)), m.start()) for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\w+);", ptx)]
    loops = {(a, b) for a, b in jumps if a < b}
    loops = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops - {(a, b)})]
    there: dict[tuple, list[bool]] = {}  # by the events of a loop: which of them a barrier precedes in all such loops
    for a, b in loops:
        events, freed = [], False
        for m in PTX.finditer(ptx, a, b):
            if m.lastgroup not in "BS":
                events.append((m.lastgroup + (m["W"] or ""), freed))
            freed = m.lastgroup == "B" or m.lastgroup == "S" and freed
        events = once(events)
        key, flags = tuple(kind for kind, _ in events), [is_freed for _, is_freed in events]
        there[key] = [x and y for x, y in zip(flags, there.get(key, flags))]
    inside, freed, found = set(), set(), []
    for loop in walk(function.regions[0]):
        body = list(walk(loop.regions[0])) if loop.name == "for" else []
        if any(op.name == "for" for op in body) or not any(op.name.startswith("warp_group_dot") for op in body):
            continue
        events = once([(kind, op) for op in body for kind in kinds(op)])
        if (flags := there.get(tuple(kind for kind, _ in events))) is None:
            found.append(f"loop {loop.results[:1]} isn't found in the PTX")
        freed |= {op for (_, op), flag in zip(events, flags or []) if flag}
        inside |= {op for op in body if op.name == "warp_group_dot_wait"}
    waited = False
    for m in PTX.finditer(ptx):
        if not any(a <= m.start() < b for a, b in loops):
            if waited and m.lastgroup in "CTS":
                found.append("shared memory is written after a loop's products without a barrier of the block")
            waited = m.lastgroup == "W" or waited and m.lastgroup not in "BCTS"
    return inside, freed, found


def kinds(op: Op) -> list[str]:
    """The events of the PTX that an operation becomes."""
    if op.name == "warp_group_dot":
        return ["M"] if op.is_async else ["M", "W0"]
    known = {
        "async_copy_global_to_local": "C", "async_commit_group": "E", "async_tma_copy_global_to_local": "T",
        "warp_group_dot_wait": f"W{op.pendings}",
    }  # fmt: skip
    return [known[op.name]] if op.name in known else []


def read(ttgir: str, ptx: str = "", values: dict | None = None, programs: int = 1) -> tuple[list[Ring], list[str]]:
    """The rings that asynchronous products of a binary read, and what is wrong with them in words. values: the launch's
    arguments by name, programs: its grid's first number; both count for kernels with partitions."""
    if "isAsync = true" not in ttgir and "is_async" not in ttgir:
        return [], []
    function = next(op for op in walk(parse(ttgir)) if op.name == "func")
    partitions = [op for op in walk(function.regions[0]) if op.name.startswith("partition")]
    warps = [int(n) for n in re.findall(r'num-warps" = (\d+)|num_warps\((\d+)\)', ttgir) for n in n if n]
    rings, found, inside, freed = {}, [], set(), set()
    if max(warps) > 4 and "warp_group_dot " in ttgir:
        inside, freed, found = lay(function, ptx) if not partitions else (set(), set(), ["partitions of 8 warps"])
    env = {f"%{name}": n for name, n in (values or {}).items() if isinstance(n, int)} if partitions else {}
    try:
        for last in range(len(partitions) + 1):
            run = Run(function, env, programs if partitions else 0, last, inside, freed)
            for ring in run.rings.values():
                if ring.ahead is not None:
                    before = rings.setdefault(ring.name, ring)
                    before.ahead, before.flying = max(before.ahead, ring.ahead), max(before.flying, ring.flying)
                    before.wrong = before.wrong or ring.wrong
    except (Unread, ArithmeticError, AttributeError, LookupError, TypeError) as why:
        found.append(f"can't be followed: {type(why).__name__} {why}")
    return list(rings.values()), [f"{ring}: {ring.wrong}" for ring in rings.values() if ring.wrong] + found

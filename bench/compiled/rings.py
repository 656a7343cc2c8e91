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

Plain kernels run with unknown arguments: a loop of unknown length takes 8 rounds, an unknown condition is true. Where
that contradicts itself, and with partitions, it is the launch's integers and program 0. What can't be followed is a
finding as well. Not seen: other branches and programs, allocations that share an address (but for the PTX rule), tiles
read into registers, loads read before they landed, clusters, and, in PTX outside of loops, any order but that of the
text.
"""

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.compiled.ttgir import Op, parse, walk

ROUNDS = 8  # more than a ring's places and the products in flight together
INTEGERS = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_, "ori": operator.or_,
    "xori": operator.xor, "minsi": min, "maxsi": max, "divsi": lambda a, b: int(a / b), "remsi": math.fmod,
    "select": lambda c, a, b: a if c else b, "extsi": int, "extui": int, "trunci": int,
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}  # fmt: skip
VIEWS = ("memdesc_trans", "memdesc_reshape", "memdesc_subslice", "memdesc_reinterpret", "tmem_subslice")
WRITES = ("async_copy_global_to_local", "async_tma_copy_global_to_local", "local_store", "tmem_store")
READS = ("local_load", "local_dealloc", "inval_barrier", "async_tma_copy_local_to_global", "tmem_load")
LOADS = {"async_copy_global_to_local": "C", "async_commit_group": "E", "async_tma_copy_global_to_local": "T"}
PTX = re.compile(  # the same in PTX; besides S, a store to shared memory, and b, a barrier of the block
    r"(?P<M>wgmma\.commit_group)|wgmma\.wait_group\.sync\.aligned\s+(?P<W>\d+)|(?P<C>cp\.async\.c[ag]\.)|(?P<b>bar\w*\."
    r"(?:cta\.)?sync\S*\s+0;)|(?P<E>cp\.async\.commit_group)|(?P<T>cp\.async\.bulk\.tensor\.\dd\.shared)|"
    r"(?P<S>st\.shared|stmatrix)"
)
HANDOVER = re.compile(
    r"(?P<barrier>\bbar(?:rier)?(?:\.cta)?\.sync\s)|(?P<fence>fence\.proxy\.async)|(?P<left>cp\.async\.bulk\.wait_group)|"
    r"(?P<read>ld\.shared|ldmatrix)|(?P<write>st\.shared|stmatrix)|(?P<arrive>mbarrier\.arrive\.shared)|"
    r"(?P<store>cp\.async\.bulk\.tensor\.\dd\.global\.shared)"
)


class Unread(Exception):
    """Something that isn't followed here."""


def event(op: Op) -> str:
    """What `lay` calls it: a product, the depth of a wait, a load, the end of a group of loads, a load by TMA."""
    if op.name == "warp_group_dot":
        return "M" if op.is_async else "M0"
    return str(op.pendings) if op.name == "warp_group_dot_wait" else LOADS.get(op.name, "")


@dataclass
class Ring:
    """Memory that products read. ahead: the most writes before the first product (`early` counts them); flying: the
    most places that products were reading when another was written; writes: all since it was allocated."""

    name: str
    places: int
    ahead: int | None = None
    flying: int = 0
    early: int | None = 0
    writes: int = 0
    wrong: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.places} places, {self.ahead} loads ahead, {self.flying} being read"


@dataclass(eq=False)
class Thread:
    """A partition. flight: its products as (views, mbarrier, phase); waited: views that no barrier has freed yet."""

    body: Iterator | None = None
    ready: object = None
    flight: list = field(default_factory=list)
    waited: list = field(default_factory=list)


class Run:
    """Runs a function. `last` is the partition that is held back, `inside` and `freed` are what `lay` gives."""

    def __init__(self, function: Op, env: dict, rings: dict, last: int, inside: set[Op], freed: set[Op]):
        self.rings, self.bars, self.inside, self.freed = rings, {}, inside, freed
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
                out = [] if None in a else [int(INTEGERS[op.name](*a))]
            elif op.name == "constant":
                out = [op.number]
            elif op.name in VIEWS:
                out = a[:1]
            elif op.name in env:
                out = [env[op.name]]
            elif op.name in ("yield", "warp_yield", "warp_return", "return"):
                return a
            elif op.name == "for":
                out = a[5::2]
                for n in [None] * ROUNDS if None in a[1:4] else range(*a[1:4]):
                    env.update(zip(op.args[4::2], out), **{op.args[0]: n})
                    out = yield from self.block(op.regions[0], env, me)
            elif op.name == "if":
                out = yield from self.block([*op.regions, []][a[0] == 0], env, me)
            elif op.name == "warp_specialize":
                for other in ops[i + 1 :]:
                    if other.name.startswith("partition"):
                        self.threads.append(t := Thread())
                        t.body = self.block(other.regions[0], env | dict(zip(other.args, a)), t)
            elif op.name == "default":
                yield from self.block(op.regions[0], env, me)
            elif not op.name.startswith("partition"):
                out = yield from self.event(op, a, me)
            env.update(dict.fromkeys(op.results))
            env.update(zip(op.results, out))
        return []

    def event(self, op: Op, a: list, me: Thread):
        """What concerns memory, products and mbarriers, [count, missing, bytes, phase]."""
        views, rest = [x for x in a if isinstance(x, tuple)], [x for x in a if not isinstance(x, tuple)]
        if op in self.freed:
            me.waited = []
        if op.name in ("local_alloc", "tmem_alloc"):
            name = op.results[0].strip("%")
            ring = self.rings.setdefault(name, Ring(name, op.shape[0] if len(op.shape) > 2 else 1))
            ring.early, ring.writes = 0, 0
            if op.args:
                self.write((ring, None))
            return [(ring, None)]
        if op.name == "call" or (op.regions and op.name not in ("reduce", "scan")):
            raise Unread(op.name)
        if op.name == "warp_group_dot_wait":
            n = max(len(me.flight) - op.pendings, 0)
            me.waited += [v for reads, *_ in me.flight[:n] for v in reads]
            me.waited, me.flight = me.waited if op in self.inside else [], me.flight[n:]
        if not views or op.name in (*READS, "warp_group_dot_wait"):
            return []
        at = views[-1][0].name, views[-1][1]  # the mbarrier, where there is one
        if op.name in ("memdesc_index", "wait_barrier") and rest[0] is None:
            raise Unread(f"a place or phase of {views[0][0].name} that no integer tells")
        if op.name == "memdesc_index":
            return [(views[0][0], rest[0])]
        if op.name == "wait_barrier":
            bar = self.bars[views[0][0].name, views[0][1]]
            if rest[1:2] != [0]:
                yield lambda: bar[3] % 2 != rest[0]
                for t in self.threads:
                    done = [i for i, (_, by, phase) in enumerate(t.flight, 1) if by is bar and phase < bar[3]]
                    t.flight = t.flight[max(done, default=0) :]
        elif op.name in ("warp_group_dot", "tc_gen5_mma"):
            is_blackwell = op.name == "tc_gen5_mma"
            if is_blackwell and rest[1:2] == [0]:
                return []
            reads = [v for v in a[:2] if v in views]
            for ring, _ in reads:
                ring.ahead, ring.early = max(ring.ahead or 0, ring.early or 0), None
            if op.is_async:
                bar = self.bars[at] if is_blackwell else None
                me.flight.append((reads, bar, bar and bar[3]))
                if bar:
                    self.arrive(at, 1)
        elif op.name == "init_barrier":
            self.bars[at] = [op.number, op.number, 0, 0]
        elif op.name not in (*WRITES, "barrier_expect", "arrive_barrier"):
            raise Unread(op.name)
        elif rest[-1:] != [0]:
            if op.name in WRITES:
                self.write(views[0])
            landed = -math.prod(op.shape) * op.bits // 8 if "tma" in op.name else 0
            count, size = {"barrier_expect": (1, op.number), "arrive_barrier": (op.number, 0)}.get(op.name, (0, landed))
            if count or size:
                self.arrive(at, count, size)
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
        ring.early = None if ring.early is None else ring.early + 1
        ring.flying = max(ring.flying, len({p for reads in products for r, p in reads if r is ring}))
        if any(map(met, products)):
            ring.wrong = "written while a product reads it"
        elif any(met(t.waited) for t in self.threads):
            ring.wrong = ring.wrong or "written after a wait of one warpgroup, without a barrier of the block"


def lay(function: Op, ptx: str) -> tuple[set[Op], set[Op], list[str]]:
    """The waits of innermost loops, the operations there that a barrier of the block precedes, and findings."""
    labels = {m[1]: m.end() for m in re.finditer(r"^(\$L__BB\w+):", ptx, re.M)}
    jumps = [(labels.get(m[1], len(ptx)), m.start()) for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\w+);", ptx)]
    loops = {(a, b) for a, b in jumps if a < b}
    loops = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops - {(a, b)})]
    there: dict[str, list[bool]] = {}  # by the events of a loop: which of them a barrier precedes in all such loops
    for a, b in loops:
        text = "".join(m["W"] or m.lastgroup for m in PTX.finditer(ptx, a, b) if m.lastgroup != "S")
        text = re.sub("([CT])(b*\\1)+", "\\1", "b" * text.endswith("b") + text)  # of loads in a row the first counts
        flags = [bool(bars) for bars in re.findall("(b*)[^b]", text)]
        events = text.replace("b", "")
        there[events] = [x and y for x, y in zip(flags, there.get(events, flags))]
    inside, freed, found = set(), set(), []
    for loop in walk(function.regions[0]):
        body = [op for op in walk(loop.regions[0]) if event(op) or op.name == "for"] if loop.name == "for" else []
        if any(op.name == "for" for op in body) or not any("warp_group" in op.name for op in body):
            continue
        body = [op for before, op in zip([loop, *body], body) if event(op) not in "CT" or event(op) != event(before)]
        events = "".join(event(op) for op in body)
        if events not in there:
            found.append(f"no loop of the PTX has products, waits and loads as one of the ttgir: {events}")
        flags = iter(there.get(events, ()))
        freed |= {op for op in body if next(next(flags, False) for _ in event(op))}
        inside |= set(body)
    waited = False
    for m in PTX.finditer(ptx):
        if not any(a <= m.start() < b for a, b in loops):
            if waited and m.lastgroup in "CTS":
                found.append("shared memory is written after a wait for products, without a barrier of the block")
            waited = m.lastgroup == "W" or (waited and m.lastgroup not in "bCTS")
    return inside, freed, found


def handed_over(ptx: str) -> list[str]:
    """Where one thread hands shared memory over while others, for all that the text's order says, still use it."""
    found, since, written = [], set(), ""
    for m in HANDOVER.finditer(ptx):
        event = m.lastgroup
        if event == "barrier":
            since, written = set(), written.removesuffix("fence")
        elif event == "fence":
            written = written and "fence"
        elif event == "write":
            written = "write"
            if "left" in since:
                found.append("a place that a bulk store read is written without a barrier after the wait for it")
        elif event == "store" and written:
            found.append("a bulk store of what threads wrote without a fence and a barrier after it")
        elif event == "arrive" and since & {"read", "left"}:
            found.append("a place is released without a barrier after its threads read it or its store was waited for")
        since.add(event)
    return sorted(set(found))


def read(ttgir: str, ptx: str = "", values: dict | None = None, programs: int = 1) -> tuple[list[Ring], list[str]]:
    """What asynchronous products of a binary read in shared memory, and what is wrong with it in words. values: the
    launch's arguments by name, programs: the first number of its grid; both count for kernels with partitions."""
    if "isAsync = true" not in ttgir and "is_async" not in ttgir:
        return [], []
    function = next(op for op in walk(parse(ttgir)) if op.name == "func")
    partitions = sum(op.name.startswith("partition") for op in walk(function.regions[0]))
    warps = max(int(a or b) for a, b in re.findall(r'"ttg.num-warps" = (\d+)|num_warps\((\d+)\)', ttgir))
    inside, freed, found = set(), set(), []
    if warps > 4 and "warp_group_dot " in ttgir:
        inside, freed, found = (inside, freed, ["partitions of 8 warps"]) if partitions else lay(function, ptx)
    known = {f"%{name}": n for name, n in (values or {}).items() if isinstance(n, int)}
    known |= {"get_program_id": 0, "get_num_programs": programs}
    for env in [known] if partitions else [{}, known]:
        rings, unread = {}, []
        try:
            for last in range(partitions + 1):
                Run(function, dict(env), rings, last, inside, freed)
            break
        except (Unread, ArithmeticError, AttributeError, LookupError, TypeError) as fault:
            unread = [f"can't be followed: {type(fault).__name__} {fault}"]
    wrong = [f"{ring}: {ring.wrong}" for ring in rings.values() if ring.wrong]
    shown = [ring for ring in rings.values() if ring.ahead is not None]
    if partitions and not unread:
        unread = [f"{r.name}: the launch is too small to fill a place twice" for r in shown if r.writes <= r.places]
    return shown, wrong + found + handed_over(ptx) + unread

"""Runs a warp-specialised Gluon kernel's Python body on the CPU, to check its protocol.

Gluon has no interpreter. Here the module's source is executed with `gl`, `mbarrier`, `tma` and wgmma replaced by
torch: each partition is a thread that holds a baton, each asynchronous copy or store an action of its own, and a
scheduler decides what moves next. What makes it strict:

- a copy poisons its destination with NaN when issued and lands when the scheduler says so, at the latest before a
  deadlock: reading without waiting reads NaN;
- a product may read shared memory at any time from its issue to its wait: its operands must be there all the while;
- barriers count arrivals, bytes and phases as mbarriers do; a barrier that gets too many raises, nobody able to move
  is a deadlock;
- shared memory written by ordinary stores must be fenced before a bulk store reads it, and so must an mbarrier's init
  before a copy counts it down; a program must not end before its copies and stores have.

It sees neither layouts, registers nor time: those are the compiler's evidence and the GPU's.
"""

import functools
import random
import re
import struct
import sys
import threading
import types

import torch


class Deadlock(AssertionError):
    pass


class Killed(BaseException):
    pass


SHARED = "attention_hopper"  # the module of jitted functions that the simulated ones import
# Whose turn it is among those who can move (0 and 1 the consumers, the last one the producer), which copy in flight
# lands when one must, the oldest or the newest, and when that is: as late as can be, or at once.
POLICIES = {
    "producer first": ((3, 2, 1, 0), 0, False),
    "consumers first": ((0, 1, 2, 3), -1, False),
    "first consumer ahead": ((0, 2, 3, 1), 0, False),
    "second consumer ahead": ((1, 3, 2, 0), -1, False),
    "copies at once": ((0, 1, 3, 2), 0, True),
    "random": (None, None, False),
}


class Machine:
    """One program (CTA): partitions, actions in flight, and the baton."""

    def __init__(self, policy: str, seed: int = 0):
        (self.order, self.landing, self.at_once), self.random = POLICIES[policy], random.Random(seed)
        self.threads, self.actions, self.error = [], [], None
        self.local = threading.local()

    def run(self, bodies):
        for rank, (function, args) in enumerate(bodies):
            thread = Partition(self, rank, function, args)
            self.threads.append(thread)
            thread.start()
        while any(not t.done for t in self.threads):
            ready = [t for t in self.threads if not t.done and (t.condition is None or t.condition())]
            if not ready and not self.actions:
                self.kill()
                raise Deadlock([f"partition {t.rank}" for t in self.threads if not t.done])
            self.step(ready)
            if self.error is not None:
                self.kill()
                raise self.error
        assert not self.actions, "the program ends, and its shared memory with it, before its copies do"

    def step(self, ready):
        if self.actions and (not ready or self.at_once or (self.order is None and self.random.random() < 0.5)):
            self.actions.pop(self.random.randrange(len(self.actions)) if self.landing is None else self.landing)()
            return
        (self.random.choice(ready) if self.order is None else min(ready, key=self.place)).resume()

    def place(self, thread):
        return self.order.index(thread.rank)

    def kill(self):
        for t in self.threads:
            if not t.done:
                t.killed = True
                t.resume()

    def pause(self, condition=None):
        """Called inside a partition: give the baton back until `condition` holds."""
        self.local.me.pause(condition)


class Partition(threading.Thread):
    def __init__(self, machine, rank, function, args):
        super().__init__(daemon=True)
        self.machine, self.rank, self.function, self.args = machine, rank, function, args
        self.go, self.back = threading.Lock(), threading.Lock()  # a baton each: held until it is given
        self.go.acquire(), self.back.acquire()
        self.done, self.killed, self.condition, self.groups = False, False, None, []

    def run(self):
        self.go.acquire()
        self.machine.local.me = self
        try:
            if not self.killed:
                self.function(*self.args)
        except Killed:
            pass
        except BaseException as error:
            self.machine.error = error
        self.done = True
        self.back.release()

    def resume(self):
        self.go.release()
        self.back.acquire()

    def pause(self, condition=None):
        self.condition = condition
        self.back.release()
        self.go.acquire()
        self.condition = None
        if self.killed:
            raise Killed


class Shared:
    """Shared memory or a view of it. `stale` is a cell: ordinary stores since the last fence."""

    def __init__(self, data, dtype, layout=None, stale=None):
        self.data, self.dtype, self.layout, self.stale = data, dtype, layout, stale if stale is not None else [False]

    @property
    def shape(self):
        return self.data.shape

    def index(self, i):
        return Shared(self.data[int(i)], self.dtype, self.layout, self.stale)

    def reshape(self, shape):
        return Shared(self.data.view(shape), self.dtype, self.layout, self.stale)

    def permute(self, order):
        return Shared(self.data.permute(order), self.dtype, self.layout, self.stale)

    def load(self, layout):
        return self.data.clone()

    def store(self, value):
        self.data.copy_(value)
        self.stale[0] = True


class Barriers:
    """An array of mbarriers: arrivals and bytes outstanding, the current phase's parity; `stale` as Shared has it."""

    def __init__(self, n):
        self.shape, self.stale = [n, 1], [False]
        self.all = [
            types.SimpleNamespace(count=None, pending=None, bytes=0, phase=0, stale=self.stale) for _ in range(n)
        ]

    def index(self, i):
        return self.all[int(i)]


def settle(bar):
    assert bar.pending >= 0, "more arrivals at a barrier than its count"
    if bar.pending == 0 and bar.bytes == 0:
        bar.pending, bar.phase = bar.count, bar.phase ^ 1


class Descriptor:
    """A tensor descriptor over a view from its base's start on: what lies outside of it reads as zero and is not
    written."""

    def __init__(self, base, shape, strides, block, layout):
        self.view = base.as_strided(shape, strides)
        self.block_shape, self.layout, self.dtype = block, layout, base.dtype

    def inside(self, at, block):
        """The part of the view at `at`, and the part of a block that it fills."""
        ends = [min(int(o) + b, n) for o, b, n in zip(at, self.block_shape, self.view.shape, strict=True)]
        there = self.view[tuple(slice(int(o), end) for o, end in zip(at, ends))]
        return there, block[tuple(slice(0, n) for n in there.shape)]


class Product:
    """A product in flight: its operands are read at its issue and again when it is waited for, and must agree. Until
    then it is good for nothing but another product's accumulator."""

    def __init__(self, a, b, acc, use_acc):
        self.parts, self.value = (a, b, acc, use_acc), None
        self.issued = [t.data.clone() for t in (a, b) if isinstance(t, Shared)]

    def complete(self):
        a, b, acc, use_acc = self.parts
        for before, operand in zip(self.issued, [t for t in (a, b) if isinstance(t, Shared)]):
            assert torch.equal(before, operand.data), "a product's operand changed, or was not there, in flight"
        a, b = (t.data if isinstance(t, Shared) else t for t in (a, b))
        acc = acc.value if isinstance(acc, Product) else acc
        product = a.float() @ b.float()
        self.value = product + acc if use_acc else product

    def __getattr__(self, name):
        raise AssertionError("a product used before it was waited for")

    __mul__ = __add__ = __sub__ = __neg__ = lambda self, *_: self.used


@functools.cache
def code(source: str, path: str) -> types.CodeType:
    return compile(source, path, "exec")


def load(path, package: str, policy: str = "producer first", seed: int = 0, edit=lambda source: source):
    """The module at `path` as a namespace whose kernels run here, and with it the one they share. `edit` may plant a
    fault in either's source: it gets both, one after the other."""
    state = types.SimpleNamespace(machine=None, program=0, programs=1)

    def wait(bar, phase):
        state.machine.pause(lambda: bar.phase != int(phase))

    def expect(bar, size):
        bar.bytes += size
        bar.pending -= 1
        settle(bar)

    def arrive(bar, count=1, pred=True):
        if pred:
            bar.pending -= count
            settle(bar)
        state.machine.pause()

    def init(bar, count):
        bar.count = bar.pending = count
        bar.stale[0] = True

    def to_shared(desc, at, bar, dest):
        assert not bar.stale[0], "a copy counts down an mbarrier whose init has no fence behind it"
        dest.data.fill_(float("nan"))

        def land():
            there, part = desc.inside(at, dest.data.zero_())
            part.copy_(there)
            bar.bytes -= dest.data.numel() * dest.data.element_size()
            settle(bar)

        state.machine.actions.append(land)
        state.machine.pause()

    def to_global(desc, at, src):
        assert not src.stale[0], "a bulk store reads shared memory written without a fence"
        store = types.SimpleNamespace(done=False)

        def land():
            if not store.done:
                there, part = desc.inside(at, src.data)
                there.copy_(part)
                store.done = True

        state.machine.local.me.groups.append(land)
        state.machine.actions.append(land)
        state.machine.pause()

    def store_wait(pendings):
        me = state.machine.local.me
        stores = [g for g in me.groups if not isinstance(g, Product)]
        for land in stores[: len(stores) - pendings]:
            land()
            me.groups.remove(land)
            if land in state.machine.actions:
                state.machine.actions.remove(land)

    def mma(a, b, acc, use_acc=True, is_async=False):
        product = Product(a, b, acc, use_acc)
        state.machine.local.me.groups.append(product)
        state.machine.pause()
        return product

    def mma_wait(outstanding, deps):
        me = state.machine.local.me
        state.machine.pause()
        products = [g for g in me.groups if isinstance(g, Product)]
        for product in products[: max(0, len(products) - outstanding)]:
            product.complete()
            me.groups.remove(product)
        values = [d.value if isinstance(d, Product) and d.value is not None else d for d in deps]
        return values[0] if len(values) == 1 else values

    def fence():
        for shared in state.shared:
            shared.stale[0] = False

    def allocate(dtype, shape, layout):
        if dtype == torch.int64:
            shared = Barriers(shape[0])
        else:
            shared = Shared(torch.full(shape, float("nan"), dtype=dtype), dtype, layout)
        state.shared.append(shared)
        return shared

    class Kernel:
        def __init__(self, function):
            self.function = function

        def __call__(self, *args):
            return self.function(*args)

        def __getitem__(self, grid):
            def launch(num_warps, **arguments):
                arguments = {k: Pointer(a) if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
                state.programs = grid[0]
                for state.program in range(grid[0]):
                    state.shared = []
                    self.function(**arguments)

            return launch

    def warp_specialize(bodies, worker_num_warps, worker_num_regs):
        state.machine = Machine(policy, seed)
        state.machine.run(bodies)

    def inside(where, mask):
        offset = where.offset[mask]
        assert ((offset >= 0) & (offset < where.base.numel())).all(), "a load or a store outside of its tensor"
        return offset

    def pointer_load(where, mask=slice(None), other=0.0):
        loaded = torch.full(where.offset.shape, other, dtype=where.base.dtype)
        loaded[mask] = where.base.view(-1)[inside(where, mask)]
        return loaded

    def pointer_store(where, value, mask=slice(None)):
        where.base.view(-1)[inside(where, mask)] = value[mask]

    class Layout:
        def __init__(self, *args, **kwargs):
            pass

        @staticmethod
        def get_default_for(block, dtype):
            return None

    gl = types.ModuleType("gl")
    vars(gl).update(
        constexpr=None, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16, int64=torch.int64,
        program_id=lambda axis: state.program, num_programs=lambda axis: state.programs,
        static_range=range, minimum=_minimum, maximum=_maximum, zeros=lambda s, d, l: torch.zeros(s, dtype=d),
        full=lambda s, x, d, l: torch.full(s, x, dtype=d),
        arange=lambda a, b, l: torch.arange(a, b), where=lambda c, a, b: torch.where(c, a, torch.tensor(b)),
        max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), exp2=torch.exp2, log2=torch.log2,
        convert_layout=lambda x, l, assert_trivial=False: x, load=pointer_load, store=pointer_store,
        split=lambda x: x.unbind(-1), inline_asm_elementwise=assembly, allocate_shared_memory=allocate,
        warp_specialize=warp_specialize, SliceLayout=Layout, NVMMADistributedLayout=Layout, DotOperandLayout=Layout,
        NVMMASharedLayout=Layout, BlockedLayout=Layout,
    )  # fmt: skip
    hopper = types.ModuleType("hopper")
    vars(hopper).update(
        fence_async_shared=fence, warpgroup_mma=mma, warpgroup_mma_wait=mma_wait, warpgroup_mma_init=lambda x: x,
        mbarrier=types.SimpleNamespace(wait=wait, expect=expect, arrive=arrive, init=init, MBarrierLayout=lambda: None),
        tma=types.SimpleNamespace(
            async_copy_global_to_shared=to_shared, async_copy_shared_to_global=to_global, store_wait=store_wait
        ),
    )  # fmt: skip
    host = types.ModuleType("host")
    host.TensorDescriptor = Descriptor
    gluon = types.ModuleType("gluon")
    gluon.jit = lambda function=None, **options: Kernel(function) if function else Kernel
    gluon.constexpr_function = lambda function: function
    gluon.language = gl
    root = "triton.experimental.gluon"
    experimental = types.ModuleType("triton.experimental")
    experimental.gluon = gluon
    fakes = {
        "triton.experimental": experimental, root: gluon, f"{root}.language": gl,
        f"{root}.language.nvidia.hopper": hopper, f"{root}.nvidia.hopper": host,
    }  # fmt: skip

    shared = types.ModuleType(f"{package}.{SHARED}")
    shared.__package__ = package
    fakes[shared.__name__] = shared
    namespace = {"__name__": f"{package}.simulated", "__package__": package}
    saved = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    paths = path.with_name(f"{SHARED}.py"), path
    sources = edit("\0".join(p.read_text() for p in paths)).split("\0")
    try:
        for source, p, names in zip(sources, paths, (vars(shared), namespace)):
            exec(code(source, str(p)), names)
    finally:
        for name, module in saved.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
    return namespace


def caught(run, line: str, wrong: str) -> bool:
    """Whether some schedule tells that `wrong` stands for `line` in the source: run(policy=, edit=) answers False, or
    raises what this simulator raises."""

    def plant(source):
        if source.count(line) != 1:
            raise ValueError(f"{line!r} stands {source.count(line)} times")
        return source.replace(line, wrong)

    for policy in POLICIES:
        try:
            if not run(policy=policy, edit=plant):
                return True
        except AssertionError:
            return True
    return False


def assembly(asm, constraints, args, dtype, is_pure, pack):
    """The one sequence that kernels have: tanh.approx.f32, off by 2^-11 of its value in either direction, which is what
    PTX allows, then a multiply-add saturated to [0, 1]."""
    known = r"{ .reg .f32 t; tanh.approx.f32 t, \$1; fma.rn.sat.f32 \$0, t, 0f(\w{8}), 0f(\w{8}); }"
    factors = re.fullmatch(known, asm)
    assert factors and (constraints, is_pure, pack) == ("=f,f", True, 1), f"assembly that isn't simulated: {asm}"
    factor, summand = (struct.unpack(">f", bytes.fromhex(x))[0] for x in factors.groups())
    sign = torch.randint(0, 2, args[0].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = args[0].tanh() * (1 + sign * 2.0**-11)
    return (t * factor + summand).clamp(0, 1).nan_to_num(0.0)


def _minimum(a, b):
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _maximum(a, b):
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


class Pointer:
    """A tensor as a kernel's pointer argument: only `+ offsets`."""

    def __init__(self, base, offset=0):
        self.base, self.offset = base, offset

    def __add__(self, offset):
        return Pointer(self.base, self.offset + offset)

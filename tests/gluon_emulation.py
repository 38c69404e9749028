"""Runs a Gluon kernel for Hopper on the CPU: there is no interpreter of Triton's for them.

The Python functions of the kernel's module run as they are, with stand-ins for the few Gluon functions that they use.
Partitions of a warp specialisation are threads, programs follow each other, matrix products are float32 ones of torch.

What hardware does not tell is an error here, whatever order the threads happen to run in. Every partition has a vector
clock, which goes to others through barriers only; memory knows when it was read and written:
- a tile is read before the barrier of its copy was waited for, or overwritten while somebody may still read it;
- a product is used before it was waited for, or its operands are overwritten before;
- what a partition wrote is copied away without the fence between the two;
- a barrier gets more arrivals or bytes than it expects; all partitions wait for each other; something is left undone.

`launch` is the entry. Not emulated: layouts, registers, masks of TMA, caches, clusters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import types

import torch
from triton.experimental.gluon import language
from triton.runtime.jit import JITFunction

TIME_LIMIT_S = 60.0  # of a program


class EmulationError(AssertionError):
    """What would be a race, a hang or garbage on the device."""


Clock = dict  # partition or copy -> how far it had come


class Program:
    """One program of a launch: its place in the grid, its partitions, and the lock that all of them share."""

    def __init__(self, number: int, count: int):
        self.number, self.count = number, count
        self.lock = threading.Condition()
        self.waiting: dict[Partition, tuple[Barrier, int]] = {}
        self.running: set[Partition] = set()
        self.failure: BaseException | None = None
        self.barriers: list[Barrier] = []
        self.copies = itertools.count()

    def stop_where_nothing_moves(self) -> None:
        """With the lock held: fails when every partition waits, and none for what has come."""
        moving = any(barrier.has_passed(parity) for barrier, parity in self.waiting.values())
        if self.running and set(self.waiting) >= self.running and not moving:
            lines = [f"{p.name} waits for parity {n} of {b}" for p, (b, n) in self.waiting.items()]
            self.failure = self.failure or EmulationError("deadlock: " + "; ".join(sorted(lines)))
        self.lock.notify_all()


class Partition:
    """A thread: its clock, the products that it has under way, and what it has done to memory since the last fence."""

    def __init__(self, name: str, program: Program, clock: Clock):
        self.name, self.program, self.clock = name, program, dict(clock)
        self.clock[name] = 1
        self.products: list[Product] = []
        self.unfenced: set[Memory] = set()
        self.copied_away: list[Memory] = []

    def knows(self, event: tuple | None) -> bool:
        return event is None or self.clock.get(event[0], 0) >= event[1]

    def now(self) -> tuple:
        return self.name, self.clock[self.name]

    def finish(self) -> None:
        if self.products or self.copied_away:
            raise EmulationError(f"{self.name} ends before its products or its copies have been waited for")


_this = threading.local()


def _partition() -> Partition:
    return _this.partition


class Memory:
    """One tile in shared memory, and who read and wrote it last."""

    def __init__(self, name: str, shape, dtype):
        self.name, self.data = name, torch.full(tuple(shape), math.nan, dtype=dtype)
        self.write: tuple | None = None
        self.reads: list[tuple] = []
        self.busy = 0  # products and copies that read it now

    def __str__(self) -> str:
        return self.name

    def begin_write(self) -> None:
        me = _partition()
        if self.busy or not me.knows(self.write) or not all(me.knows(read) for read in self.reads):
            raise EmulationError(f"{me.name} overwrites {self}, which may still be in use")
        self.reads = []

    def check_read(self, asynchronous: bool) -> None:
        me = _partition()
        if self.write is None:
            raise EmulationError(f"{me.name} reads {self}, which nobody has written")
        if not me.knows(self.write):
            raise EmulationError(f"{me.name} reads {self} before it has waited for what is written there")
        if asynchronous and self in me.unfenced:
            raise EmulationError(f"{me.name} has {self} read without a fence behind its own stores")

    def end_read(self) -> None:
        self.busy -= 1
        self.reads.append(_partition().now())


class View:
    """A shared memory descriptor: tiles along the first dimension, or a tile in some shape."""

    def __init__(self, tiles: list[Memory], shape, memory: Memory | None = None, data: torch.Tensor | None = None):
        self.tiles, self.shape, self.memory, self.data = tiles, list(shape), memory, data
        self.dtype = (tiles[0] if tiles else memory).data.dtype

    def index(self, place: int) -> View:
        tile = self.tiles[place]
        return tile if isinstance(tile, Barrier) else View([], self.shape[1:], tile, tile.data)

    def reshape(self, shape) -> View:
        return View([], shape, self.memory, self.data.view(tuple(shape)))

    def permute(self, order) -> View:
        data = self.data.permute(tuple(order))
        return View([], data.shape, self.memory, data)

    def store(self, value: torch.Tensor) -> None:
        with _partition().program.lock:
            self.memory.begin_write()
            self.data.copy_(value)
            self.memory.write = _partition().now()
            _partition().unfenced.add(self.memory)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all bytes have come."""

    data = torch.zeros((), dtype=torch.int64)

    def __init__(self, name: str, program: Program):
        self.name, self.program = name, program
        self.count = self.pending = self.bytes = self.phase = 0
        self.gathering: Clock = {}
        self.passed: Clock = {}

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}, {self.pending} arrivals and {self.bytes} bytes to come)"

    def has_passed(self, parity: int) -> bool:
        return self.phase & 1 != parity

    def arrive(self, count: int, byte_count: int = 0) -> None:
        me = _partition()
        if count > self.pending:
            raise EmulationError(f"{me.name} arrives once too often at {self}")
        self.bytes += byte_count
        _merge(self.gathering, me.clock)
        me.clock[me.name] += 1
        self.pending -= count
        self.pass_if_complete()

    def receive(self, byte_count: int, event: tuple) -> None:
        if byte_count > self.bytes:
            raise EmulationError(f"a copy of {byte_count} bytes comes to {self}")
        self.gathering[event[0]] = event[1]
        self.bytes -= byte_count
        self.pass_if_complete()

    def pass_if_complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.passed, self.gathering = self.gathering, {}
            self.phase, self.pending = self.phase + 1, self.count
            self.program.lock.notify_all()


def _merge(into: Clock, other: Clock) -> None:
    for name, time in other.items():
        into[name] = max(into.get(name, 0), time)


class Product:
    """A warpgroup product under way; what it returns must be waited for."""

    def __init__(self, value: torch.Tensor, operands: list[Memory]):
        self.value, self.operands = value, operands
        self.done = False


class Descriptor:
    """A tensor in global memory that the copy engine moves tiles of; zeros are read around it, nothing is written."""

    def __init__(self, host):
        self.tensor = host.base.as_strided(host.shape, host.strides)
        self.block, self.dtype, self.layout = host.block_shape, host.base.dtype, host.layout

    def places(self, first) -> tuple:
        """Slices of the tensor, and those of a block that lie in it."""
        if any(start < 0 for start in first):
            raise EmulationError(f"a tile begins at {first}")
        ends = [min(start + size, most) for start, size, most in zip(first, self.block, self.tensor.shape, strict=True)]
        inside = tuple(slice(start, max(start, end)) for start, end in zip(first, ends, strict=True))
        return inside, tuple(slice(0, s.stop - s.start) for s in inside)


class Pointer:
    """Into a contiguous tensor."""

    def __init__(self, flat: torch.Tensor, place=0):
        self.flat, self.place = flat, place

    def __add__(self, offset) -> Pointer:
        return Pointer(self.flat, self.place + offset)


class Mbarrier:
    """Stands in for the module of that name."""

    MBarrierLayout = staticmethod(lambda: Barrier)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier: Barrier, byte_count: int) -> None:
        with _partition().program.lock:
            barrier.arrive(1, byte_count)

    @staticmethod
    def arrive(barrier: Barrier, *, count: int = 1) -> None:
        with _partition().program.lock:
            barrier.arrive(count)

    @staticmethod
    def wait(barrier: Barrier, parity: int) -> None:
        me = _partition()
        program = me.program
        with program.lock:
            program.waiting[me] = (barrier, parity)
            while not barrier.has_passed(parity):
                program.stop_where_nothing_moves()
                if program.failure is not None:
                    raise program.failure
                if not program.lock.wait(TIME_LIMIT_S):
                    raise EmulationError(f"{me.name} has waited for {TIME_LIMIT_S} s at {barrier}")
            del program.waiting[me]
            _merge(me.clock, barrier.passed)


def load_tile(descriptor: Descriptor, first, barrier: Barrier, tile: View) -> None:
    program = _partition().program
    with program.lock:
        tile.memory.begin_write()
        inside, part = descriptor.places(first)
        tile.data.zero_()
        tile.data[part] = descriptor.tensor[inside]
        tile.memory.write = (f"copy {next(program.copies)}", 1)
        barrier.receive(tile.data.numel() * tile.data.element_size(), tile.memory.write)


def store_tile(descriptor: Descriptor, first, tile: View) -> None:
    with _partition().program.lock:
        tile.memory.check_read(asynchronous=True)
        inside, part = descriptor.places(first)
        descriptor.tensor[inside] = tile.data[part]
        tile.memory.busy += 1
        _partition().copied_away.append(tile.memory)


class Tma:
    """Stands in for the module of that name, but for the two functions that versions of Triton name differently."""

    @staticmethod
    def store_wait(pending: int) -> None:
        me = _partition()
        with me.program.lock:
            while len(me.copied_away) > pending:
                me.copied_away.pop(0).end_read()


def fence_async_shared() -> None:
    _partition().unfenced.clear()


def warpgroup_mma(a, b: View, acc, *, use_acc: bool = True, is_async: bool = False) -> Product:
    if not is_async:
        raise NotImplementedError("synchronous products")
    me = _partition()
    with me.program.lock:
        operands = [view.memory for view in (a, b) if isinstance(view, View)]
        for memory in operands:
            memory.check_read(asynchronous=True)
            memory.busy += 1
        value = (a.data if isinstance(a, View) else a).float() @ b.data.float()
        if use_acc:
            value = value + (acc.value if isinstance(acc, Product) else acc)
        me.products.append(Product(value, operands))
        return me.products[-1]


def warpgroup_mma_wait(pending: int, deps):
    me = _partition()
    with me.program.lock:
        while len(me.products) > pending:
            product = me.products.pop(0)
            product.done = True
            for memory in product.operands:
                memory.end_read()
    if not all(t.done for t in deps if isinstance(t, Product)):
        raise EmulationError(f"{me.name} uses a product that it has not waited for")
    values = tuple(t.value if isinstance(t, Product) else t for t in deps)
    return values[0] if len(values) == 1 else values


class Gl:
    """Stands in for gluon.language."""

    constexpr, NVMMADistributedLayout = staticmethod(lambda x: x), language.NVMMADistributedLayout
    bfloat16, float16, float32, int32, int64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64
    static_range, exp2, log2 = staticmethod(range), staticmethod(torch.exp2), staticmethod(torch.log2)
    zeros_like, div_rn = staticmethod(torch.zeros_like), staticmethod(torch.div)
    SliceLayout = DotOperandLayout = staticmethod(lambda *parts: parts)
    convert_layout = staticmethod(lambda x, layout: x)

    @staticmethod
    def where(condition, a, b):
        return torch.where(condition, torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def maximum(a, b):
        return max(a, b) if isinstance(a, int) else torch.maximum(a, b)

    @staticmethod
    def minimum(a, b):
        return min(a, b) if isinstance(a, int) else torch.minimum(a, b)

    @staticmethod
    def max(x, axis):
        return x.amax(axis)

    @staticmethod
    def sum(x, axis):
        return x.sum(axis)

    @staticmethod
    def arange(start, end, layout):
        return torch.arange(start, end)

    @staticmethod
    def full(shape, value, dtype, layout):
        return torch.full(shape, value, dtype=dtype)

    @staticmethod
    def zeros(shape, dtype, layout):
        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def cast(x, dtype):
        return x

    @staticmethod
    def program_id(axis):
        return _partition().program.number

    @staticmethod
    def num_programs(axis):
        return _partition().program.count

    @staticmethod
    def store(pointer: Pointer, value, mask=None):
        place, value = torch.as_tensor(pointer.place), torch.as_tensor(value)
        mask = torch.ones_like(place, dtype=torch.bool) if mask is None else mask
        pointer.flat[place[mask]] = value[mask].to(pointer.flat.dtype)

    @staticmethod
    def allocate_shared_memory(dtype, shape, layout):
        program = _partition().program
        if layout is Barrier:
            names = [f"barrier {len(program.barriers) + i}" for i in range(shape[0])]
            tiles = [Barrier(name, program) for name in names]
            program.barriers += tiles
        else:
            tiles = [Memory(f"tile {i} of {shape[1:]}", shape[1:], dtype) for i in range(shape[0])]
        return View(tiles, shape)

    @staticmethod
    def warp_specialize(functions, warps, registers):
        parent = _partition()
        program = parent.program
        count = itertools.count()
        parts = [Partition(f"{f.__name__} {next(count)}", program, parent.clock) for f, _ in functions]
        program.running = set(parts)
        threads = [threading.Thread(target=_run, args=(p, *work)) for p, work in zip(parts, functions, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if program.failure is not None:
            raise program.failure


def _run(partition: Partition, function, arguments) -> None:
    _this.partition = partition
    program = partition.program
    try:
        function(*arguments)
        partition.finish()
    except BaseException as error:
        program.failure = program.failure or error
    with program.lock:
        program.running.discard(partition)
        program.waiting.pop(partition, None)
        program.stop_where_nothing_moves()


def _emulated(module: types.ModuleType) -> dict:
    """The names of a kernel's module, with stand-ins for Gluon's, and its functions over these names."""
    names = dict(vars(module))
    names |= {"gl": Gl, "tma": Tma, "mbarrier": Mbarrier, "load_tile": load_tile, "store_tile": store_tile}
    names |= {f.__name__: f for f in (fence_async_shared, warpgroup_mma, warpgroup_mma_wait)}
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
        elif isinstance(value, language.constexpr):
            names[name] = value.value
    return names


def launch(module: types.ModuleType, kernel: JITFunction, programs: int, **arguments) -> None:
    """Runs kernel[(programs,)](**arguments) of a module on CPU tensors.

    Raises:
        EmulationError: the kernel does what hardware answers with garbage or a hang.
    """
    arguments = {name: _argument(x) for name, x in arguments.items()}
    function = types.FunctionType(kernel.fn.__code__, _emulated(module))
    for number in range(programs):
        program = Program(number, programs)
        _this.partition = Partition("program", program, {})
        function(**arguments)
        for barrier in program.barriers:
            if barrier.pending != barrier.count or barrier.bytes:
                raise EmulationError(f"at the end {barrier} is in the middle of a phase")


def _argument(x):
    if isinstance(x, torch.Tensor):
        return Pointer(x.view(-1))
    return Descriptor(x) if hasattr(x, "block_shape") else x


@contextlib.contextmanager
def emulating(module: types.ModuleType, kernel: str):
    """Inside the block, launches of this kernel run here. Options of the compiler do not count."""

    class Launcher:
        def __getitem__(self, grid):
            def run(*, num_warps, **arguments):
                launch(module, real, grid[0], **arguments)

            return run

    real = getattr(module, kernel)
    setattr(module, kernel, Launcher())
    try:
        yield
    finally:
        setattr(module, kernel, real)

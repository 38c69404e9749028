"""Loads, stores and atomics that check every lane: extent, alignment, duplicate stores, races, poison.

A pointer knows the argument it came from: the operations that move pointers around pass `attr["regions"]` on. A pointer
whose origin was lost (read from memory, cast from an integer) may point into any argument.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from . import poison
from .cooperative import Team
from .errors import DuplicateStore, KernelError, Misaligned, NotFaithful, OutOfBounds, PoisonStored, Race
from .launch import Launch
from .regions import Region
from .settings import settings

ACQUIRING = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
RELEASING = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


def _union(*groups: tuple[Region, ...]) -> tuple[Region, ...]:
    return tuple(dict.fromkeys(region for group in groups for region in group))


def _carries_pointers(name: str) -> Callable:
    """The builder's method of this name, with the origin of pointer operands passed on to its result."""
    original = getattr(interpreter.InterpreterBuilder, name)

    def method(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        groups = [arg.attr.get("regions") for arg in args if isinstance(arg, TensorHandle) and "regions" in arg.attr]
        if groups and isinstance(result.dtype.scalar, tl.pointer_type):
            result.attr["regions"] = _union(*groups)
        return result

    return method


def _mask_array(mask: TensorHandle | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(mask.data if isinstance(mask, TensorHandle) else mask, shape).astype(bool, copy=False)


class MemoryOps(interpreter.InterpreterBuilder):
    launch: Launch | None = None

    create_addptr = _carries_pointers("create_addptr")
    create_splat = _carries_pointers("create_splat")
    create_unsplat = _carries_pointers("create_unsplat")
    create_broadcast = _carries_pointers("create_broadcast")
    create_expand_dims = _carries_pointers("create_expand_dims")
    create_reshape = _carries_pointers("create_reshape")
    create_trans = _carries_pointers("create_trans")
    create_bitcast = _carries_pointers("create_bitcast")
    create_ptr_to_int = create_bitcast
    create_int_to_ptr = create_bitcast
    create_select = _carries_pointers("create_select")

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        active = _mask_array(mask, ptrs.data.shape)
        if is_volatile and active.any():
            self._running().team.look(int(ptrs.data[active].ravel()[0]))
        memory = self._check(ptrs, active, "load")
        if memory is not None:
            element = ptrs.get_element_ty()
            return TensorHandle(memory.view(_get_np_dtype(element)).reshape(ptrs.data.shape).copy(), element)
        handle = TensorHandle(active, tl.int1)
        loaded = super().create_masked_load(ptrs, handle, other, cache_modifier, eviction_policy, is_volatile)
        return loaded if other is not None else self._with_poison(loaded, active)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        active = _mask_array(mask, ptrs.data.shape)
        memory = self._check(ptrs, active, "store")
        if value.data.dtype != _get_np_dtype(ptrs.get_element_ty()):
            raise NotFaithful(f"store of {value.data.dtype} data through a pointer to {ptrs.get_element_ty()}")
        self._check_no_poison(value, active, "store")
        launch = self._running()
        launch.clock.stored = True
        launch.team.changed()
        if memory is not None:
            memory.view(value.data.dtype)[...] = np.broadcast_to(value.data, ptrs.data.shape).ravel()
            return None
        return super().create_masked_store(ptrs, value, TensorHandle(active, tl.int1), cache_modifier, eviction_policy)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        element = ptr.get_element_ty()
        if element == tl.bfloat16:
            raise NotFaithful("atomics on bfloat16 are not available; accumulate in float32")
        active = _mask_array(mask, ptr.data.shape)
        with self._atomic(ptr, active, sem):
            self._check_no_poison(val, active, "atomic")
            before = super().create_atomic_rmw(rmwOp, ptr, val, TensorHandle(active, tl.int1), sem, scope)
        return self._with_poison(before, active)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        with self._atomic(ptr, np.ones(ptr.data.shape, dtype=bool), sem):
            return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_barrier(self):
        self._running().clock.stored = False

    @contextlib.contextmanager
    def _atomic(self, pointers: TensorHandle, active: np.ndarray, semantic) -> Iterator[None]:
        """Around an atomic. In a cooperative launch other programs run before it, and learn what it changed."""
        launch = self._running()
        scalar = pointers.data.size == 1
        cooperative = isinstance(launch.team, Team)
        if active.any() and (scalar or cooperative):
            launch.team.look(int(pointers.data[active].ravel()[0]))
        if cooperative and scalar and semantic in RELEASING and launch.clock.stored:
            raise Race(
                "a release while stores of this program's other warps may be on their way: one thread makes it, so "
                "tl.debug_barrier() has to come between"
            )
        memory = self._check(pointers, active, "atomic", semantic)
        before = None if memory is None else memory.copy()
        yield
        if memory is None or not np.array_equal(memory, before):
            launch.team.changed()

    # checks

    def _running(self) -> Launch:
        if self.launch is None:
            raise KernelError("memory is accessible only while a kernel runs")
        return self.launch

    def _check(self, pointers: TensorHandle, active: np.ndarray, access: str, semantic=None) -> np.ndarray | None:
        """Checks every active lane. Returns the bytes if all lanes are active and lie side by side, else None."""
        launch = self._running()
        all_active = bool(active.all())
        addresses = (pointers.data.ravel() if all_active else pointers.data[active]).view(np.int64)
        if addresses.size == 0:
            return None
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        contiguous = bool((addresses[1:] - addresses[:-1] == size).all())
        ends = addresses[[0, -1]] if contiguous else addresses
        low, high = int(ends.min()), int(ends.max()) + size
        regions = pointers.attr.get("regions") or tuple(launch.regions)
        misaligned = ends % size != 0
        if misaligned.any():
            lane = int(np.flatnonzero(misaligned)[0])
            self._fail(Misaligned, access, f"is not aligned to {size} bytes", addresses, lane, size, regions, active)
        touched: Sequence[tuple[Region, slice | np.ndarray]]
        for region in regions:
            if region.holds_all(low, high):
                touched = [(region, slice(low, high) if contiguous else addresses)]
                break
        else:
            touched = self._locate(regions, addresses, size, access, active)
            contiguous = False
        for region, part in touched:
            if access == "store" or (settings.races and not launch.races_allowed(region)):
                self._record(region, part, size, access)
        if semantic is not None and addresses.size == 1:  # only scalar atomics are taken for synchronisation
            if semantic in ACQUIRING:
                launch.acquire(low)
            if semantic in RELEASING:
                launch.release(low)
        if not (contiguous and all_active):
            return None
        return np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)

    def _locate(
        self, regions: tuple[Region, ...], addresses: np.ndarray, size: int, access: str, active: np.ndarray
    ) -> list[tuple[Region, np.ndarray]]:
        """Splits the lanes by the region they lie in; raises OutOfBounds for a lane that lies in none."""
        left = np.ones(addresses.shape, dtype=bool)
        touched = []
        for region in regions:
            inside = left & region.holds(addresses, size)
            if inside.any():
                touched.append((region, addresses[inside]))
                left &= ~inside
        if left.any():
            lane = int(np.flatnonzero(left)[0])
            what = f"is out of bounds ({int(left.sum())} of {addresses.size} active lanes are)"
            self._fail(OutOfBounds, access, what, addresses, lane, size, regions, active)
        return touched

    def _record(self, region: Region, part: slice | np.ndarray, size: int, access: str) -> None:
        """Updates the shadow for lanes of one region (a slice of addresses, or one address each); reports conflicts."""
        launch, shadow = self._running(), region.shadow
        clock = launch.clock
        cells = shadow.cells(part, size)

        def fail(error: type[KernelError], what: str, lane: int) -> NoReturn:
            addresses = np.arange(part.start, part.stop, size) if isinstance(part, slice) else part
            self._fail(error, access, what, addresses, lane, size, (region,), None)

        if access == "store":
            duplicate = shadow.first_duplicate(cells)
            if duplicate is not None:
                fail(DuplicateStore, "writes bytes that another lane of the same store also writes", duplicate)
            if not settings.races or launch.races_allowed(region):
                return
        if access == "load":
            conflict = shadow.read(cells, clock)
        else:
            conflict = shadow.write(cells, clock, atomic=access == "atomic")
        if conflict is not None:
            lane = conflict.position * shadow.width // size if isinstance(cells, slice) else conflict.position
            other = f"program {launch.program_index(conflict.program)}"
            what = f"races: {conflict.kind.format(other=other)} the same bytes, and nothing orders the two"
            fail(Race, what, lane)

    def _fail(self, error, access: str, what: str, addresses, lane: int, size: int, regions, active) -> NoReturn:
        """Raises `error` about active lane number `lane`; `active` (or None if unknown) turns it into a block index."""
        address = int(addresses[lane])
        # the region nearest to the address is the one the kernel most likely meant
        distance = [max(region.start - address, address - region.end, 0) for region in regions]
        place = regions[distance.index(min(distance))].place(address, size) if regions else "the kernel has no tensors"
        position = ""
        if active is not None:
            position = f" at block index {tuple(int(axis[lane]) for axis in np.nonzero(active))}"
        raise error(f"{access} {what}: {place}{position}")

    # poison

    def _with_poison(self, loaded: TensorHandle, active: np.ndarray) -> TensorHandle:
        if active.all() or not settings.poison:
            return loaded
        self._running().poison_exists = True
        return TensorHandle(poison.fill(loaded.data, loaded.dtype.scalar, ~active), loaded.dtype)

    def _check_no_poison(self, value: TensorHandle, active: np.ndarray, access: str) -> None:
        if not self._running().poison_exists:
            return
        poisoned = np.broadcast_to(poison.find(value.data, value.dtype.scalar), active.shape) & active
        if poisoned.any():
            index = tuple(int(axis[0]) for axis in np.nonzero(poisoned))
            raise PoisonStored(
                f"{access} of a value that comes from a lane masked off in tl.load or an atomic: undefined on a GPU. "
                f"Give tl.load an `other`, or mask the {access}. "
                f"{int(poisoned.sum())} lanes, first at block index {index}"
            )

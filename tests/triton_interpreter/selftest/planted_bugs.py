"""The table of planted bugs: a launch each, and what the hardened interpreter must say about it.

Tensors are views in the middle of larger buffers, so that even a plain interpreter survives an out-of-bounds access.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import planted_kernels as kernels

GUARD = 256


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with 256 spare elements of the same storage on both sides."""
    buffer = torch.zeros(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return guarded(torch.zeros(shape, dtype=dtype))


def words(size: int) -> torch.Tensor:
    return zeros(size, dtype=torch.int32)


def grid_for_100(meta: dict) -> tuple[int]:
    return (triton.cdiv(100, meta["BLOCK"]),)


def ramp(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return guarded(torch.arange(size).to(dtype))


def misaligned_matrix() -> torch.Tensor:
    return torch.zeros(1 + 8 * 16)[1:].view(8, 16)


@dataclasses.dataclass(frozen=True)
class Bug:
    """A launch, the error and message it must raise, and whether the plain interpreter accepts it silently."""

    name: str
    launch: Callable[[], object]
    error: str
    message: str
    plain_misses: bool = True


def counter_bug(order: str) -> Bug:
    def launch() -> None:
        kernels.last_program_sums[(4,)](ramp(4), zeros(4), words(1), zeros(1), PROGRAMS=4, ORDER=order)

    message = r"program \(3, 0, 0\).*load races: program \(0, 0, 0\) writes the same bytes.*'partial'"
    return Bug(f"a counter that is only {order} does not order writes before reads", launch, "Race", message)


BUGS = [
    Bug(
        "load out of bounds",
        lambda: kernels.copy_without_load_mask[(2,)](ramp(100), zeros(100), 100, BLOCK=64),
        "OutOfBounds",
        r"copy_without_load_mask, program \(1, 0, 0\), line \d+ of planted_kernels.py: "
        r"load is out of bounds \(28 of 64 .*'x', element 100 \(byte offset 400\).* bytes 0 to 400: "
        r"torch.float32 of shape \(100,\) at block index \(36,\)",
    ),
    Bug(
        "store out of bounds",
        lambda: kernels.copy_without_store_mask[(2,)](ramp(100), zeros(100), 100, BLOCK=64),
        "OutOfBounds",
        r"copy_without_store_mask, program \(1, 0, 0\).*store is out of bounds.*'out', element 100",
    ),
    Bug(
        "load before the start",
        lambda: kernels.copy_shifted[(1,)](ramp(64), zeros(64), -1, BLOCK=64),
        "OutOfBounds",
        r"'x', element -1 \(byte offset -4\)",
    ),
    Bug(
        "load of the next row of the same storage",
        lambda: kernels.copy_shifted[(1,)](guarded(torch.ones(2, 64))[0], zeros(64), 1, BLOCK=64),
        "OutOfBounds",
        r"'x', element 64 .*spans bytes 0 to 256",
    ),
    Bug(
        "load through one argument of memory that belongs to another",
        lambda: kernels.copy_shifted[(1,)](*guarded(torch.ones(2, 64)), 1, BLOCK=64),
        "OutOfBounds",
        r"1 of 64 active lanes.*'x', element 64 ",
    ),
    Bug(
        "load from a hole of a strided view",
        lambda: kernels.copy_shifted[(1,)](guarded(torch.ones(16, 16))[:, :8], zeros(8), 4, BLOCK=8),
        "OutOfBounds",
        r"4 of 8 active lanes.*'x', element 8 .*strides \(16, 1\)",
    ),
    Bug(
        "out of bounds after the pointers were transposed",
        lambda: kernels.copy_transposed_pointers[(1,)](zeros(8, 8), zeros(8, 8), BLOCK=8),
        "OutOfBounds",
        r"'x', element 64",
    ),
    Bug(
        "block pointer without boundary check",
        lambda: kernels.copy_through_block_pointer[(1,)](ramp(30), zeros(32), 30, BLOCK=32),
        "OutOfBounds",
        r"'x', element 30",
    ),
    Bug(
        "descriptor larger than its tensor",
        lambda: kernels.copy_through_descriptor[(1,)](zeros(8, 16), zeros(16, 16), 16, COLUMNS=16, ROWS=16),
        "OutOfBounds",
        r"'x', element 128",
    ),
    Bug(
        "descriptor with a misaligned base",
        lambda: kernels.copy_through_descriptor[(1,)](misaligned_matrix(), zeros(8, 16), 8, COLUMNS=16, ROWS=8),
        "Misaligned",
        r"descriptor of argument 'x': base is 4 bytes past a 16-byte boundary",
        plain_misses=False,
    ),
    Bug(
        "descriptor block with a misaligned start",
        lambda: kernels.copy_host_descriptor[(1,)](
            TensorDescriptor.from_tensor(torch.zeros(8, 32), [8, 16]), zeros(8, 16), ROWS=8, COLUMNS=16, start=2
        ),
        "Misaligned",
        r"descriptor of argument 'source': the block starts 8 bytes into the last dimension",
        plain_misses=False,
    ),
    Bug(
        "misaligned load",
        lambda: kernels.load_words_at_odd_bytes[(1,)](words(64), words(16), BLOCK=16),
        "Misaligned",
        r"load is not aligned to 4 bytes: argument 'x'",
    ),
    Bug(
        "two lanes store to one address",
        lambda: kernels.store_twice[(1,)](zeros(64), BLOCK=64),
        "DuplicateStore",
        r"store_twice, program \(0, 0, 0\).*'out', element 0",
    ),
    Bug(
        "two lanes of mixed width store overlapping words",
        lambda: kernels.store_overlapping_words[(1,)](words(64), BLOCK=16),
        "DuplicateStore",
        r"'out', element 2 \(byte offset 4\)",
    ),
    Bug(
        "read-modify-write by several programs",
        lambda: kernels.add_without_atomic[(4,)](ramp(4), zeros(1)),
        "Race",
        r"load races: program \(0, 0, 0\) writes the same bytes.*'total', element 0",
    ),
    Bug(
        "read after another program's write",
        lambda: kernels.read_what_neighbour_writes[(4,)](zeros(5)),
        "Race",
        r"read_what_neighbour_writes, program \(1, 0, 0\).*load races: program \(0, 0, 0\) writes",
    ),
    Bug(
        "write after other programs' reads",
        lambda: kernels.write_what_everyone_read[(3,)](zeros(1), zeros(3)),
        "Race",
        r"store races: several other programs read",
    ),
    Bug(
        "read of one byte of a word that another program writes",
        lambda: kernels.read_a_byte_that_another_writes[(2,)](words(1), zeros(1, dtype=torch.int8)),
        "Race",
        r"load races: program \(0, 0, 0\) writes.*'x', element 1 \(byte offset 1\)",
    ),
    Bug(
        "plain read of a value that others update atomically",
        lambda: kernels.read_while_others_add[(3,)](zeros(1), zeros(3)),
        "Race",
        r"races: program \(0, 0, 0\) (updates atomically|reads)",
    ),
    *(counter_bug(order) for order in ("relaxed", "acquire", "release")),
    Bug(
        "sum over masked-off lanes",
        lambda: kernels.sum_without_other[(1,)](ramp(50), zeros(1), 50, BLOCK=64),
        "PoisonStored",
        r"sum_without_other.*Give tl.load an `other`",
    ),
    Bug(
        "maximum over masked-off lanes",
        lambda: kernels.max_without_other[(1,)](ramp(50), zeros(1), 50, BLOCK=64),
        "PoisonStored",
        r"max_without_other",
    ),
    Bug(
        "copy of masked-off integers",
        lambda: kernels.copy_without_other[(1,)](ramp(50, torch.int32), words(64), 50, BLOCK=64),
        "PoisonStored",
        r"14 lanes, first at block index \(50,\)",
    ),
    Bug(
        "masked-off lanes through conversions and arithmetic",
        lambda: kernels.convert_without_other[(1,)](
            ramp(10, torch.bfloat16), zeros(16, dtype=torch.float16), 10, BLOCK=16
        ),
        "PoisonStored",
        r"6 lanes, first at block index \(10,\)",
    ),
    Bug(
        "masked-off integers through a conversion",
        lambda: kernels.convert_integers_without_other[(1,)](ramp(50, torch.int32), zeros(64), 50, BLOCK=64),
        "PoisonStored",
        r"14 lanes, first at block index \(50,\)",
    ),
    Bug(
        "matrix product over masked-off lanes",
        lambda: kernels.matmul_without_other[(1,)](zeros(16, 16), zeros(16, 16), 10, BLOCK=16),
        "PoisonStored",
        r"256 lanes, first at block index \(0, 0\)",
    ),
    Bug(
        "sum in bfloat16",
        lambda: kernels.sum_in_bfloat16[(1,)](ramp(32, torch.bfloat16), zeros(1, dtype=torch.bfloat16), BLOCK=32),
        "NotFaithful",
        r"reduction over bf16.*upcast to float32 first",
    ),
    Bug(
        "scan in bfloat16",
        lambda: kernels.scan_in_bfloat16[(1,)](ramp(32, torch.bfloat16), zeros(32, dtype=torch.bfloat16), BLOCK=32),
        "NotFaithful",
        r"scan over bf16.*upcast to float32 first",
    ),
    Bug(
        "inline assembly",
        lambda: kernels.assembly[(1,)](ramp(32), zeros(32), BLOCK=32),
        "NotFaithful",
        r"inline assembly cannot be interpreted",
        plain_misses=False,
    ),
    Bug(
        "a libdevice function without an equivalent",
        lambda: kernels.bessel[(1,)](ramp(32), zeros(32), BLOCK=32),
        "NotFaithful",
        r"libdevice.j0 is not available.*'erf'",
        plain_misses=False,
    ),
    Bug(
        "atomics on bfloat16",
        lambda: kernels.add_bfloat16_atomically[(1,)](ramp(8, torch.bfloat16), zeros(8, dtype=torch.bfloat16), BLOCK=8),
        "NotFaithful",
        r"accumulate in float32",
        plain_misses=False,
    ),
    Bug(
        "integer division by zero",
        lambda: kernels.divide_integers[(1,)](ramp(8, torch.int32), words(8), BLOCK=8),
        "Undefined",
        r"integer division of int32 by zero",
    ),
    Bug(
        "shift by the width of the type",
        lambda: kernels.shift_integers[(1,)](ramp(4, torch.int32), words(4), BLOCK=4),
        "Undefined",
        r"shift of int32 by 32",
    ),
    Bug(
        "gather with a negative index",
        lambda: kernels.gather_before_the_start[(1,)](ramp(8), zeros(8), BLOCK=8),
        "Undefined",
        r"gather along axis 0 of size 8 got the index -1",
    ),
    Bug(
        "a block as a condition",
        lambda: kernels.branch_on_a_block[(1,)](ramp(8), zeros(8), BLOCK=8),
        "Undefined",
        r"a block of shape \(.*8.*\) was used as a condition",
    ),
    Bug(
        "conversion to int8 out of range",
        lambda: kernels.quantise_without_clamp[(1,)](ramp(4), zeros(4, dtype=torch.int8), BLOCK=4),
        "Undefined",
        r"conversion of 200 from fp32 to int8",
    ),
    Bug(
        "tl.dot below the smallest shape",
        lambda: kernels.small_dot[(1,)](zeros(4, 4), zeros(4, 4), BLOCK=4),
        "KernelFailed",
        r"K >= (8|16)",  # 8 since Triton 3.8
    ),
    Bug(
        "one autotune configuration is wrong",
        lambda: kernels.wrong_in_one_configuration[grid_for_100](ramp(100), zeros(100), 100),
        "ConfigMismatch",
        r"argument 'out' depends on the configuration: 1 of 100 elements differ, first at \(99,\).*BLOCK: 128",
        plain_misses=False,
    ),
    Bug(
        "tl.multiple_of of a number that is none",
        lambda: kernels.wrong_multiple[(1,)](ramp(32), zeros(16), 8, BLOCK=16),
        "Undefined",
        r"tl.multiple_of promises multiples of 16 along dimension 0, got 8",
    ),
    Bug(
        "tl.max_contiguous of a block that wraps around",
        lambda: kernels.wrong_contiguity[(1,)](ramp(16), zeros(16), BLOCK=16),
        "Undefined",
        r"tl.max_contiguous promises groups of 16 consecutive elements along dimension 0, got a step of -15",
    ),
    Bug(
        "tl.device_assert of something false",
        lambda: kernels.broken_promise[(1,)](ramp(16), zeros(16), BLOCK=16),
        "KernelFailed",
        r"AssertionError\('too large'\)",
    ),
]

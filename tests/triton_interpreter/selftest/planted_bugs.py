"""Kernels with one mistake each, and what the hardened interpreter must say about it.

Tensors are views in the middle of larger buffers, so that even a plain interpreter survives an out-of-bounds access.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

GUARD = 256


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with 256 spare elements of the same storage on both sides."""
    buffer = torch.zeros(tensor.numel() + 2 * GUARD, dtype=tensor.dtype)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return guarded(torch.zeros(shape, dtype=dtype))


def ramp(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return guarded(torch.arange(size).to(dtype))


@triton.jit
def copy_without_load_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < n)


@triton.jit
def copy_without_store_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0))


@triton.jit
def copy_shifted(x, out, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + shift))


@triton.jit
def copy_transposed_pointers(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = tl.trans(x + i[:, None] * BLOCK + i[None, :] + 1)
    tl.store(out + i[:, None] * BLOCK + i[None, :], tl.load(pointers))


@triton.jit
def copy_through_block_pointer(x, out, n, BLOCK: tl.constexpr):
    block = tl.make_block_ptr(x, shape=(n,), strides=(1,), offsets=(0,), block_shape=(BLOCK,), order=(0,))
    tl.store(out + tl.arange(0, BLOCK), tl.load(block))


@triton.jit
def copy_through_descriptor(x, out, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    source = tl.make_tensor_descriptor(x, shape=[rows, COLUMNS], strides=[COLUMNS, 1], block_shape=[ROWS, COLUMNS])
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out + i[:, None] * COLUMNS + j[None, :], source.load([0, 0]))


@triton.jit
def copy_host_descriptor(source, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, start):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out + i[:, None] * COLUMNS + j[None, :], source.load([0, start]))


@triton.jit
def store_twice(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i // 2, i.to(tl.float32))


@triton.jit
def store_overlapping_words(out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    bytes_of_out = out.to(tl.pointer_type(tl.int8))
    tl.store((bytes_of_out + i * 2).to(tl.pointer_type(tl.int16)), i.to(tl.int16))
    tl.store((bytes_of_out + i * 2 + i % 2 * -2).to(tl.pointer_type(tl.int32)), i, mask=i % 2 == 1)
    tl.store((bytes_of_out + (i + i % 2) * 2).to(tl.pointer_type(tl.int16)), i.to(tl.int16))


@triton.jit
def add_without_atomic(x, total):
    tl.store(total, tl.load(total) + tl.load(x + tl.program_id(0)))


@triton.jit
def read_what_neighbour_writes(x):
    program = tl.program_id(0)
    tl.store(x + program + 1, tl.load(x + program) + 1.0)


@triton.jit
def write_what_everyone_read(x, out):
    program = tl.program_id(0)
    tl.store(out + program, tl.load(x))
    if program == tl.num_programs(0) - 1:
        tl.store(x, 1.0)


@triton.jit
def read_a_byte_that_another_writes(x, out):
    if tl.program_id(0) == 0:
        tl.store(x, 7)
    else:
        tl.store(out, tl.load(x.to(tl.pointer_type(tl.int8)) + 1))


@triton.jit
def read_while_others_add(x, out):
    tl.atomic_add(x, 1.0)
    tl.store(out + tl.program_id(0), tl.load(x))


@triton.jit
def last_program_sums_relaxed(x, partial, counter, out, PROGRAMS: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partial + program, tl.load(x + program) * 2.0)
    if tl.atomic_add(counter, 1, sem="relaxed") == PROGRAMS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), axis=0))


@triton.jit
def sum_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def max_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.max(tl.maximum(tl.load(x + i, mask=i < n), 0.0), axis=0))


@triton.jit
def copy_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))


@triton.jit
def convert_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(tl.float32) * 2.0 - 1.0
    tl.store(out + i, tl.exp(value).to(tl.float16))


@triton.jit
def sum_in_bfloat16(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def scan_in_bfloat16(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.associative_scan(tl.load(x + i), 0, add))


@triton.jit
def assembly(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    value = tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [value], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out + i, value)


@triton.jit
def bessel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, libdevice.j0(tl.load(x + i)))


@triton.jit
def add_bfloat16_atomically(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out + i, tl.load(x + i))


@triton.jit
def divide_integers(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 100 // tl.load(x + i))


@triton.jit
def shift_integers(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, 1 << (tl.load(x + i) + 30))


@triton.jit
def gather_before_the_start(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.gather(tl.load(x + i), i - 1, 0))


@triton.jit
def branch_on_a_block(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if value > 1.0:
        value = value * 2.0
    tl.store(out + i, value)


@triton.jit
def quantise_without_clamp(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, (tl.load(x + i) * 100.0).to(tl.int8))


@triton.jit
def load_words_at_odd_bytes(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = (x.to(tl.pointer_type(tl.int8)) + 2).to(tl.pointer_type(tl.int32))
    tl.store(out + i, tl.load(words + i))


@triton.jit
def small_dot(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = tl.load(x + i[:, None] * BLOCK + i[None, :])
    tl.store(out + i[:, None] * BLOCK + i[None, :], tl.dot(tile, tile))


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 32})], key=["n"])
@triton.jit
def wrong_in_one_configuration(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    limit = n - 1 if BLOCK == 128 else n
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0) + 1.0, mask=i < limit)


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


BUGS = [
    Bug(
        "load out of bounds",
        lambda: copy_without_load_mask[(2,)](ramp(100), zeros(100), 100, BLOCK=64),
        "OutOfBounds",
        r"copy_without_load_mask, program \(1, 0, 0\), line \d+ of planted_bugs.py: load is out of bounds \(28 of 64 .*"
        r"'x', element 100 \(byte offset 400\).* bytes 0 to 400: "
        r"torch.float32 of shape \(100,\) at block index \(36,\)",
    ),
    Bug(
        "store out of bounds",
        lambda: copy_without_store_mask[(2,)](ramp(100), zeros(100), 100, BLOCK=64),
        "OutOfBounds",
        r"copy_without_store_mask, program \(1, 0, 0\).*store is out of bounds.*'out', element 100",
    ),
    Bug(
        "load before the start",
        lambda: copy_shifted[(1,)](ramp(64), zeros(64), -1, BLOCK=64),
        "OutOfBounds",
        r"'x', element -1 \(byte offset -4\)",
    ),
    Bug(
        "load of the next row of the same storage",
        lambda: copy_shifted[(1,)](guarded(torch.ones(2, 64))[0], zeros(64), 1, BLOCK=64),
        "OutOfBounds",
        r"'x', element 64 .*spans bytes 0 to 256",
    ),
    Bug(
        "load from a hole of a strided view",
        lambda: copy_shifted[(1,)](guarded(torch.ones(16, 16))[:, :8], zeros(8), 4, BLOCK=8),
        "OutOfBounds",
        r"4 of 8 active lanes.*'x', element 8 .*strides \(16, 1\)",
    ),
    Bug(
        "out of bounds after the pointers were transposed",
        lambda: copy_transposed_pointers[(1,)](zeros(8, 8), zeros(8, 8), BLOCK=8),
        "OutOfBounds",
        r"'x', element 64",
    ),
    Bug(
        "block pointer without boundary check",
        lambda: copy_through_block_pointer[(1,)](ramp(30), zeros(32), 30, BLOCK=32),
        "OutOfBounds",
        r"'x', element 30",
    ),
    Bug(
        "descriptor larger than its tensor",
        lambda: copy_through_descriptor[(1,)](zeros(8, 16), zeros(16, 16), 16, COLUMNS=16, ROWS=16),
        "OutOfBounds",
        r"'x', element 128",
    ),
    Bug(
        "descriptor with a misaligned base",
        lambda: copy_through_descriptor[(1,)](misaligned_matrix(), zeros(8, 16), 8, COLUMNS=16, ROWS=8),
        "Misaligned",
        r"descriptor of argument 'x': base is 4 bytes past a 16-byte boundary",
        plain_misses=False,
    ),
    Bug(
        "descriptor block with a misaligned start",
        lambda: copy_host_descriptor[(1,)](
            TensorDescriptor.from_tensor(torch.zeros(8, 32), [8, 16]), zeros(8, 16), ROWS=8, COLUMNS=16, start=2
        ),
        "Misaligned",
        r"descriptor of argument 'source': the block starts 8 bytes into the last dimension",
        plain_misses=False,
    ),
    Bug(
        "misaligned load",
        lambda: load_words_at_odd_bytes[(1,)](zeros(64, dtype=torch.int32), zeros(16, dtype=torch.int32), BLOCK=16),
        "Misaligned",
        r"load is not aligned to 4 bytes: argument 'x'",
    ),
    Bug(
        "two lanes store to one address",
        lambda: store_twice[(1,)](zeros(64), BLOCK=64),
        "DuplicateStore",
        r"store_twice, program \(0, 0, 0\).*'out', element 0",
    ),
    Bug(
        "two lanes of mixed width store overlapping words",
        lambda: store_overlapping_words[(1,)](zeros(64, dtype=torch.int32), BLOCK=16),
        "DuplicateStore",
        r"'out', element 2 \(byte offset 4\)",
    ),
    Bug(
        "read-modify-write by several programs",
        lambda: add_without_atomic[(4,)](ramp(4), zeros(1)),
        "Race",
        r"load races: program \(0, 0, 0\) writes the same bytes.*'total', element 0",
    ),
    Bug(
        "read after another program's write",
        lambda: read_what_neighbour_writes[(4,)](zeros(5)),
        "Race",
        r"read_what_neighbour_writes, program \(1, 0, 0\).*load races: program \(0, 0, 0\) writes",
    ),
    Bug(
        "write after other programs' reads",
        lambda: write_what_everyone_read[(3,)](zeros(1), zeros(3)),
        "Race",
        r"store races: several other programs read",
    ),
    Bug(
        "read of one byte of a word that another program writes",
        lambda: read_a_byte_that_another_writes[(2,)](zeros(1, dtype=torch.int32), zeros(1, dtype=torch.int8)),
        "Race",
        r"load races: program \(0, 0, 0\) writes.*'x', element 1 \(byte offset 1\)",
    ),
    Bug(
        "plain read of a value that others update atomically",
        lambda: read_while_others_add[(3,)](zeros(1), zeros(3)),
        "Race",
        r"races: program \(0, 0, 0\) (updates atomically|reads)",
    ),
    Bug(
        "a relaxed counter orders nothing",
        lambda: last_program_sums_relaxed[(4,)](ramp(4), zeros(4), zeros(1, dtype=torch.int32), zeros(1), PROGRAMS=4),
        "Race",
        r"program \(3, 0, 0\).*load races: program \(0, 0, 0\) writes the same bytes.*'partial'",
    ),
    Bug(
        "sum over masked-off lanes",
        lambda: sum_without_other[(1,)](ramp(50), zeros(1), 50, BLOCK=64),
        "PoisonStored",
        r"sum_without_other.*Give tl.load an `other`",
    ),
    Bug(
        "maximum over masked-off lanes",
        lambda: max_without_other[(1,)](ramp(50), zeros(1), 50, BLOCK=64),
        "PoisonStored",
        r"max_without_other",
    ),
    Bug(
        "copy of masked-off integers",
        lambda: copy_without_other[(1,)](ramp(50, torch.int32), zeros(64, dtype=torch.int32), 50, BLOCK=64),
        "PoisonStored",
        r"14 lanes, first at block index \(50,\)",
    ),
    Bug(
        "masked-off lanes through conversions and arithmetic",
        lambda: convert_without_other[(1,)](ramp(10, torch.bfloat16), zeros(16, dtype=torch.float16), 10, BLOCK=16),
        "PoisonStored",
        r"6 lanes, first at block index \(10,\)",
    ),
    Bug(
        "sum in bfloat16",
        lambda: sum_in_bfloat16[(1,)](ramp(32, torch.bfloat16), zeros(1, dtype=torch.bfloat16), BLOCK=32),
        "NotFaithful",
        r"reduction over bf16.*upcast to float32 first",
    ),
    Bug(
        "scan in bfloat16",
        lambda: scan_in_bfloat16[(1,)](ramp(32, torch.bfloat16), zeros(32, dtype=torch.bfloat16), BLOCK=32),
        "NotFaithful",
        r"scan over bf16.*upcast to float32 first",
    ),
    Bug(
        "inline assembly",
        lambda: assembly[(1,)](ramp(32), zeros(32), BLOCK=32),
        "NotFaithful",
        r"inline assembly cannot be interpreted",
        plain_misses=False,
    ),
    Bug(
        "a libdevice function without an equivalent",
        lambda: bessel[(1,)](ramp(32), zeros(32), BLOCK=32),
        "NotFaithful",
        r"libdevice.j0 is not available.*'erf'",
        plain_misses=False,
    ),
    Bug(
        "atomics on bfloat16",
        lambda: add_bfloat16_atomically[(1,)](ramp(8, torch.bfloat16), zeros(8, dtype=torch.bfloat16), BLOCK=8),
        "NotFaithful",
        r"accumulate in float32",
        plain_misses=False,
    ),
    Bug(
        "integer division by zero",
        lambda: divide_integers[(1,)](ramp(8, torch.int32), zeros(8, dtype=torch.int32), BLOCK=8),
        "Undefined",
        r"integer division of int32 by zero",
    ),
    Bug(
        "shift by the width of the type",
        lambda: shift_integers[(1,)](ramp(4, torch.int32), zeros(4, dtype=torch.int32), BLOCK=4),
        "Undefined",
        r"shift of int32 by 32",
    ),
    Bug(
        "gather with a negative index",
        lambda: gather_before_the_start[(1,)](ramp(8), zeros(8), BLOCK=8),
        "Undefined",
        r"gather along axis 0 of size 8 got the index -1",
    ),
    Bug(
        "a block as a condition",
        lambda: branch_on_a_block[(1,)](ramp(8), zeros(8), BLOCK=8),
        "Undefined",
        r"a block of shape \(.*8.*\) was used as a condition",
    ),
    Bug(
        "conversion to int8 out of range",
        lambda: quantise_without_clamp[(1,)](ramp(4), zeros(4, dtype=torch.int8), BLOCK=4),
        "Undefined",
        r"conversion of 200 from fp32 to int8",
    ),
    Bug(
        "tl.dot below the smallest shape",
        lambda: small_dot[(1,)](zeros(8, 8), zeros(8, 8), BLOCK=8),
        "KernelFailed",
        r"K >= 16",
    ),
    Bug(
        "one autotune configuration is wrong",
        lambda: wrong_in_one_configuration[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](ramp(100), zeros(100), 100),
        "ConfigMismatch",
        r"argument 'out' depends on the configuration: 1 of 100 elements differ, first at \(99,\).*BLOCK: 128",
        plain_misses=False,
    ),
]

"""Kernels with one mistake each; planted_bugs.py says which and what must be said about it."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


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
def last_program_sums(x, partial, counter, out, PROGRAMS: tl.constexpr, ORDER: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partial + program, tl.load(x + program) * 2.0)
    if tl.atomic_add(counter, 1, sem=ORDER) == PROGRAMS - 1:
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
def convert_integers_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n).to(tl.float32) * 0.5)


@triton.jit
def matmul_without_other(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    index = i[:, None] * BLOCK + i[None, :]
    right = tl.load(x + index, mask=i[:, None] < n, other=0.0)
    tl.store(out + index, tl.dot(tl.load(x + index, mask=i[None, :] < n), right))


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


@triton.jit
def wrong_multiple(x, out, start, BLOCK: tl.constexpr):
    i = tl.multiple_of(start, 16) + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + i))


@triton.jit
def wrong_contiguity(x, out, BLOCK: tl.constexpr):
    i = tl.max_contiguous((tl.arange(0, BLOCK) + 3) % BLOCK, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + i))


@triton.jit
def broken_promise(x, out, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.device_assert(value < BLOCK // 2, "too large")
    tl.store(out + tl.arange(0, BLOCK), value)

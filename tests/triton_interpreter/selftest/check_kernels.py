"""Correct kernels run without complaint, in every program order, and give the right numbers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import triton_interpreter

triton_interpreter.install()

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["forward", "reverse", "shuffled"], autouse=True)
def program_order(request):
    with triton_interpreter.override(program_order=request.param, seed=3):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@triton.jit
def add_scaled(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 127, 128, 300])
def test_pointwise_equals_torch_bit_for_bit(dtype, size):
    x, y = random(size, dtype=dtype), random(size, dtype=dtype).flip(0)
    out = torch.empty_like(x)
    add_scaled[(triton.cdiv(size, 128),)](x, y, out, size, BLOCK=128)
    assert torch.equal(out, x + y)


@triton.jit
def silu(x, out, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out + i * stride, (value * tl.sigmoid(value)).to(out.dtype.element_ty), mask=i < n)


def test_strided_views_are_reached_exactly():
    storage = random(50, 3)
    before = storage.clone()
    view = storage[:, 1]
    silu[(4,)](view, view, 50, 3, BLOCK=16)
    torch.testing.assert_close(view, torch.nn.functional.silu(before[:, 1]))
    assert torch.equal(storage[:, ::2], before[:, ::2])


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + j, mask=j < columns, other=-float("inf")).to(tl.float32)
    exponential = tl.exp(value - tl.max(value, axis=0))
    result = exponential / tl.sum(exponential, axis=0)
    tl.store(out + row * columns + j, result.to(out.dtype.element_ty), mask=j < columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_softmax(dtype):
    x = random(5, 77, dtype=dtype)
    out = torch.empty_like(x)
    softmax[(5,)](x, out, 77, BLOCK=128)
    exact = x.double().softmax(1)
    error = (out.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-7, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}[dtype]


@triton.jit
def matmul(a, b, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):  # persistent: programs take tiles in turn
        rows = tile // tl.cdiv(N, BN) * BM + tl.arange(0, BM)
        columns = tile % tl.cdiv(N, BN) * BN + tl.arange(0, BN)
        accumulator = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            left = tl.load(a + rows[:, None] * K + k[None, :], mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0)
            right = tl.load(b + k[:, None] * N + columns, mask=(k[:, None] < K) & (columns < N), other=0.0)
            accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        tl.store(out + rows[:, None] * N + columns[None, :], accumulator.to(out.dtype.element_ty), mask=inside)


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float32, "ieee", 3e-7),
        (torch.float32, "tf32", 1e-3),
        (torch.float16, "ieee", 2.5e-4),
        (torch.bfloat16, "ieee", 1.8e-3),
    ],
)
def test_persistent_matmul(dtype, precision, bound):
    a, b = random(50, 41, dtype=dtype), random(41, 70, dtype=dtype)
    out = torch.empty(50, 70, dtype=dtype)
    matmul[(3,)](a, b, out, 50, 70, 41, BM=32, BN=32, BK=16, PRECISION=precision)
    exact = a.double() @ b.double()
    error = (out.double() - exact).norm() / exact.norm()
    assert error < bound
    if dtype in (torch.float16, torch.bfloat16):
        assert error < 1.1 * (exact.to(dtype).double() - exact).norm() / exact.norm()  # one rounding at the end


@triton.jit
def attention(q, k, v, out, scale, T, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    base = tl.program_id(1) * T * D
    query = tl.load(q + base + rows[:, None] * D + d, mask=rows[:, None] < T, other=0.0)
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    accumulator = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(T, (tl.program_id(0) + 1) * BM), BN):
        columns = start + tl.arange(0, BN)
        key = tl.load(k + base + columns[:, None] * D + d, mask=columns[:, None] < T, other=0.0)
        value = tl.load(v + base + columns[:, None] * D + d, mask=columns[:, None] < T, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where((columns[None, :] < T) & (rows[:, None] >= columns[None, :]), score, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(score, 1))
        p = tl.exp(score - new_largest[:, None])
        correction = tl.exp(largest - new_largest)
        total = total * correction + tl.sum(p, 1)
        accumulator = accumulator * correction[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
        largest = new_largest
    result = (accumulator / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + base + rows[:, None] * D + d, result, mask=rows[:, None] < T)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 4e-4), (torch.bfloat16, 4e-3)])
def test_causal_attention(dtype, bound):
    q, k, v = (random(2, 40 + i, 32, dtype=dtype)[:, :40].contiguous() for i in range(3))
    out = torch.empty_like(q)
    attention[(2, 2)](q, k, v, out, 32**-0.5, 40, D=32, BM=32, BN=16)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (out.double() - exact).norm() / exact.norm() < bound


@triton.jit
def histogram(x, counts, weights, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(counts + value, 1, mask=i < n)
    tl.atomic_add(weights + value, 0.5, mask=i < n)
    tl.atomic_max(counts + BINS, tl.max(tl.where(i < n, value, 0), axis=0))


def test_atomics_of_many_lanes_and_programs():
    x = torch.randint(0, 16, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    counts, weights = torch.zeros(17, dtype=torch.int32), torch.zeros(16)
    histogram[(4,)](x, counts, weights, 1000, BINS=16, BLOCK=256)
    expected = torch.bincount(x, minlength=16)
    assert torch.equal(counts[:16].long(), expected)
    assert torch.equal(weights, expected * 0.5)
    assert counts[16] == 15


@triton.jit
def sum_under_lock(x, total, lock, BLOCK: tl.constexpr):
    part = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(total, tl.load(total) + part)
    tl.atomic_xchg(lock, 0)


@triton.jit
def sum_by_last_program(x, partial, counter, total, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(partial + program, tl.sum(tl.load(x + program * BLOCK + tl.arange(0, BLOCK)), axis=0))
    if tl.atomic_add(counter, 1) == PROGRAMS - 1:
        tl.store(total, tl.sum(tl.load(partial + tl.arange(0, PROGRAMS)), axis=0))


def test_a_lock_and_a_counter_order_programs():
    x, zero = random(64), torch.zeros(1, dtype=torch.int32)
    total = torch.zeros(1)
    sum_under_lock[(4,)](x, total, zero, BLOCK=16)
    torch.testing.assert_close(total[0], x.sum())
    assert zero.item() == 0
    sum_by_last_program[(4,)](x, torch.empty(4), zero, total.zero_(), PROGRAMS=4, BLOCK=16)
    torch.testing.assert_close(total[0], x.sum())


@triton.jit
def transpose_by_descriptor(source, out, M, N, BM: tl.constexpr, BN: tl.constexpr):
    target = tl.make_tensor_descriptor(out, shape=[N, M], strides=[M, 1], block_shape=[BN, BM])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    target.store([column, row], tl.trans(source.load([row, column])))


def test_descriptors_are_cut_off_at_their_shape():
    x = random(40, 24)
    out = torch.empty(24, 40)
    transpose_by_descriptor[(3, 2)](TensorDescriptor.from_tensor(x, [16, 16]), out, 40, 24, BM=16, BN=16)
    assert torch.equal(out, x.T)


@triton.jit
def helper(x, HALVE: tl.constexpr):
    if HALVE:
        x = x * 0.5
    return x, -x


@triton.jit
def uses_everything(x, out, optional, flag, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    a, b = helper(value, True)
    if optional is not None:
        a += tl.load(optional + i)
    if flag:
        b = tl.sort(b)
    k = 0
    while k < 2:
        a = tl.where(i % 2 == k, a + 1.0, a)
        k += 1
    joined = tl.join(a, b)
    first, second = tl.split(joined)
    tl.debug_barrier()
    tl.device_assert(BLOCK == 8)
    tl.store(out + i, tl.gather(first, BLOCK - 1 - i, 0))
    tl.store(out + BLOCK + i, tl.reshape(tl.cat(second, second, can_reorder=True), (2, BLOCK)).sum(axis=0))


def test_language_features():
    x = random(8)
    out = torch.empty(16)
    uses_everything[(1,)](x, out, None, True, BLOCK=8)
    torch.testing.assert_close(out[:8], (x * 0.5 + 1).flip(0))
    torch.testing.assert_close(out[8:], 2 * (-x * 0.5).sort().values)
    uses_everything[(1,)](x, out, x, False, BLOCK=8)
    torch.testing.assert_close(out[:8], (x * 1.5 + 1).flip(0))


@triton.jit
def scale_by_table(table, first, second, BLOCK: tl.constexpr):
    pointer = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32)) + tl.arange(0, BLOCK)
    tl.store(pointer, tl.load(pointer) * 2.0)


def test_pointers_read_from_memory_may_lead_into_any_argument():
    first, second = torch.ones(16), torch.full((16,), 3.0)
    table = torch.tensor([second.data_ptr(), first.data_ptr()])
    scale_by_table[(2,)](table, first, second, BLOCK=16)
    assert first.eq(2).all()
    assert second.eq(6).all()
    with pytest.raises(triton_interpreter.OutOfBounds):
        scale_by_table[(2,)](table, first, None, BLOCK=16)


class Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        silu_in_own_type[(triton.cdiv(x.numel(), 16),)](x, x, out, x.numel(), BACKWARD=False, BLOCK=16)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        grad_output = grad_output.contiguous()
        silu_in_own_type[(triton.cdiv(x.numel(), 16),)](x, grad_output, out, x.numel(), BACKWARD=True, BLOCK=16)
        return out


@triton.jit
def silu_in_own_type(x, grad_output, out, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    sigmoid = 1 / (1 + tl.exp(-value))
    if BACKWARD:
        result = tl.load(grad_output + i, mask=i < n, other=0.0) * sigmoid * (1 + value * (1 - sigmoid))
    else:
        result = value * sigmoid
    tl.store(out + i, result, mask=i < n)


def test_gradcheck_runs_through_the_interpreter():
    assert torch.autograd.gradcheck(Silu.apply, random(21, dtype=torch.float64).requires_grad_())

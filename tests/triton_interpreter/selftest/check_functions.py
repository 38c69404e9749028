"""Functions, tl.dot, reductions, scans and Philox of the interpreter against torch in float64 and Python integers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

import triton_interpreter

triton_interpreter.install()

# transcendental functions


@triton.jit
def unary(x, out, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    if OP == "tl.exp":
        c = tl.exp(a)
    elif OP == "tl.log":
        c = tl.log(a)
    elif OP == "tl.erf":
        c = tl.erf(a)
    elif OP == "tl.rsqrt":
        c = tl.rsqrt(a)
    elif OP == "tanh":
        c = libdevice.tanh(a)
    elif OP == "erf":
        c = libdevice.erf(a)
    elif OP == "log1p":
        c = libdevice.log1p(a)
    elif OP == "rsqrt":
        c = libdevice.rsqrt(a)
    elif OP == "pow":
        c = libdevice.pow(a, 1.5)
    elif OP == "fma":
        c = libdevice.fma(a, a, -1.0)
    elif OP == "isnan":
        c = libdevice.isnan(a).to(tl.float32)
    tl.store(out + i, c)


REFERENCES = {
    "exp": torch.exp,
    "log": torch.log,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "log1p": torch.log1p,
    "rsqrt": lambda x: 1 / x.sqrt(),
    "pow": lambda x: x**1.5,
    "fma": lambda x: x * x - 1,
    "isnan": lambda x: x.isnan().double(),
}


@pytest.mark.parametrize("operation", ["tl.exp", "tl.log", "tl.erf", "tl.rsqrt", *list(REFERENCES)[2:]])
def test_functions_round_a_float64_result_once(operation):
    x = torch.rand(4096, generator=torch.Generator().manual_seed(3)) * 8 + 2.0**-10
    out = torch.empty_like(x)
    unary[(1,)](x, out, BLOCK=4096, OP=operation)
    expected = REFERENCES[operation.removeprefix("tl.")](x.double())
    # two float64 libraries may differ in the last of 53 bits, which moves one rounding to float32 in 2**29
    assert (out != expected.float()).sum() <= 1
    assert ((out.double() - expected) / expected.abs().clamp_min(1e-30)).abs().max() < 2.0**-23


def test_libdevice_refuses_narrow_types():
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(triton_interpreter.KernelFailed, match=r"libdevice.tanh takes float32 or float64 .* got bf16"):
        unary[(1,)](x, x.clone(), BLOCK=8, OP="tanh")


# dot


@triton.jit
def multiply(a, b, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    index = i[:, None] * SIZE + i[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index), input_precision=PRECISION))


def test_tf32_drops_the_low_bits_of_operands():
    a = torch.eye(16) * (1 + 2.0**-10 + 2.0**-11)  # the last term does not fit into tf32
    out = torch.empty(16, 16)
    multiply[(1,)](a, torch.eye(16), out, SIZE=16, PRECISION="tf32")
    assert torch.equal(out, torch.eye(16) * (1 + 2.0**-10))
    multiply[(1,)](a, torch.eye(16), out, SIZE=16, PRECISION="ieee")
    assert torch.equal(out, a)


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("tf32", 1e-4, 1e-3), ("ieee", 0, 3e-7), ("tf32x3", 0, 1e-6), ("bf16x3", 1e-6, 3e-5), ("bf16x6", 0, 1e-6)],
)
def test_dot_precision(precision, low, high):
    generator = torch.Generator().manual_seed(4)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    out = torch.empty(64, 64)
    multiply[(1,)](a, b, out, SIZE=64, PRECISION=precision)
    exact = a.double() @ b.double()
    error = (out - exact).norm() / exact.norm()
    assert low <= error <= high


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn])
def test_dot_of_narrow_types_accumulates_in_float32(dtype):
    a = torch.randint(-8, 9, (32, 32), generator=torch.Generator().manual_seed(5)).float()
    b = torch.full((32, 32), 1.125)
    out = torch.empty(32, 32)
    multiply[(1,)](a.to(dtype), b.to(dtype), out, SIZE=32, PRECISION="ieee")
    assert torch.equal(out, a @ b.to(dtype).float())


# reductions


@triton.jit
def softmax_state(m1, l1, m2, l2):
    m = tl.maximum(m1, m2)
    return m, l1 * tl.exp(m1 - m) + l2 * tl.exp(m2 - m)


@triton.jit
def recurrence(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def reductions(x, out, where, pair, scans, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    tile = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(out + i, tl.sum(tile, axis=1))
    tl.store(out + M + i, tl.max(tile, axis=1))
    tl.store(where + i, tl.argmin(tile, axis=1))
    tl.store(out + 2 * M, tl.sum(tile))
    m, l = tl.reduce((tile, tl.full((M, N), 1.0, tl.float32)), 1, softmax_state)
    tl.store(pair + i, m + tl.log(l))
    _, last = tl.reduce((tl.full((M, N), 0.5, tl.float32), tile), 1, recurrence)  # associative, not commutative
    tl.store(pair + M + i, last)
    _, state = tl.associative_scan((tl.full((M, N), 0.5, tl.float32), tile), 1, recurrence)
    tl.store(scans + i[:, None] * N + j[None, :], state)
    tl.store(scans + M * N + i[:, None] * N + j[None, :], tl.cumsum(tile, axis=1, reverse=True))


def test_reductions_and_scans():
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(6))
    x[2, 5] = x[2, 20] = -9.0
    out, where = torch.empty(17), torch.empty(8, dtype=torch.int32)
    pair, scans = torch.empty(16), torch.empty(2, 8, 32)
    reductions[(1,)](x, out, where, pair, scans, M=8, N=32)
    torch.testing.assert_close(out[:8], x.sum(1))
    assert torch.equal(out[8:16], x.amax(1))
    assert where.tolist() == x.argmin(1).tolist()
    assert where[2] == 5
    torch.testing.assert_close(out[16], x.sum())
    torch.testing.assert_close(pair[:8], x.logsumexp(1))
    state, expected = torch.zeros(8), torch.empty(8, 32)
    for step in range(32):
        expected[:, step] = state = 0.5 * state + x[:, step]
    torch.testing.assert_close(scans[0], expected)
    torch.testing.assert_close(pair[8:], expected[:, -1])
    torch.testing.assert_close(scans[1], x.flip(1).cumsum(1).flip(1))


# Philox


@triton.jit
def philox_words(out, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    counter = i.to(tl.uint32) * 77777777
    words = tl.philox(seed, counter, i.to(tl.uint32), counter ^ 5, i.to(tl.uint32) * 0)
    for k in tl.static_range(4):
        tl.store(out + i * 4 + k, words[k].to(tl.int32, bitcast=True))


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, with Python integers."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second, first >> 32 ^ counter[3] ^ key[1], first]
        counter = [word & 0xFFFFFFFF for word in counter]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("seed", [0, 42, 0x123456789ABCDEF])
def test_philox_words(seed):
    out = torch.empty(128, 4, dtype=torch.int32)
    philox_words[(1,)](out, seed, BLOCK=128)
    for i, words in enumerate(out.tolist()):
        counter = i * 77777777 & 0xFFFFFFFF
        expected = philox4x32_10([counter, i, counter ^ 5, 0], [seed & 0xFFFFFFFF, seed >> 32])
        assert [word & 0xFFFFFFFF for word in words] == expected


def test_philox_known_answer():
    """The published test vector of Random123: counter and key all zero."""
    assert philox4x32_10([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

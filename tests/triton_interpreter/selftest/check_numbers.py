"""Conversions and arithmetic of the interpreter against torch, Python integers and exact fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter

triton_interpreter.install()

ALL_BFLOAT16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, except that all NaNs are one."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    equal = actual.view(integer) == expected.view(integer)
    if actual.is_floating_point():
        equal |= actual.float().isnan() & expected.float().isnan()
    return bool(equal.all())


@triton.jit
def convert(x, out, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, value.to(out.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def converted(values: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    size = triton.next_power_of_2(values.numel())
    padded = torch.zeros(size, dtype=values.dtype)
    padded[: values.numel()] = values
    out = torch.empty(size, dtype=dtype)
    convert[(1,)](padded, out, BLOCK=size, ROUNDING=rounding)
    return out[: values.numel()]


@triton.jit
def binary(x, y, out, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a / b
    elif OP == "div_rn":
        c = tl.div_rn(a, b)
    elif OP == "less":
        c = a < b
    elif OP == "not_equal":
        c = a != b
    elif OP == "floordiv":
        c = a // b
    elif OP == "mod":
        c = a % b
    elif OP == "umulhi":
        c = tl.umulhi(a, b)
    elif OP == "shl":
        c = a << b
    elif OP == "shr":
        c = a >> b
    elif OP == "maximum":
        c = tl.maximum(a, b)
    elif OP == "minimum_nan":
        c = tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i, c)


def apply(x: torch.Tensor, y: torch.Tensor, operation: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=dtype or x.dtype)
    binary[(1,)](x, y, out, BLOCK=x.numel(), OP=operation)
    return out


def bit_pairs(dtype: torch.dtype, count: int = 1 << 15) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands of every exponent: random bit patterns, NaNs, infinities and subnormals among them."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    integer = bits.get(dtype, torch.int64)
    limits = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randint(limits.min, limits.max, (count,), dtype=integer, generator=generator) for _ in range(2))
    return x.view(dtype), y.view(dtype)


def nearest(value: Fraction, dtype: type[np.floating]) -> np.floating:
    """`value` rounded to nearest even in a numpy type, by comparing exact distances."""
    guess = dtype(float(value))
    candidates = [guess, np.nextafter(guess, dtype(np.inf)), np.nextafter(guess, dtype(-np.inf))]
    finite = [candidate for candidate in candidates if np.isfinite(candidate)]
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[guess.itemsize]
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(unsigned)) & 1))


# conversions


def test_bfloat16_to_float32_is_exact():
    assert same(converted(ALL_BFLOAT16, torch.float32), ALL_BFLOAT16.float())


@pytest.mark.parametrize("low_bits", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_to_bfloat16_rounds_to_nearest_even(low_bits):
    values = ((torch.arange(1 << 16) << 16) | low_bits).to(torch.int32).view(torch.float32)
    assert same(converted(values, torch.bfloat16), values.to(torch.bfloat16))


def test_float64_to_bfloat16_rounds_once():
    just_above_half = 1 + 2.0**-8 + 2.0**-40  # by way of float32 this becomes a tie, and would go to 1
    tiny = 2.0**-134 * (1 + 2.0**-45)  # just above half of the smallest subnormal
    values = torch.tensor([just_above_half, -just_above_half, tiny, -tiny, 3.4e38, 1e300], dtype=torch.float64)
    expected = torch.tensor([1 + 2.0**-7, -1 - 2.0**-7, 2.0**-133, -(2.0**-133), float("inf"), float("inf")])
    assert same(converted(values, torch.bfloat16), expected.to(torch.bfloat16))


def test_conversions_toward_zero():
    x, _ = bit_pairs(torch.float32)
    finite = x[x.isfinite()]
    truncated = (finite.view(torch.int32) & -0x10000).view(torch.float32)
    assert same(converted(finite, torch.bfloat16, "rtz"), truncated.bfloat16())
    half = converted(finite, torch.float16, "rtz").float()
    inside = finite.abs() < 65504
    assert (half[inside].abs() <= finite[inside].abs()).all()
    assert (half[inside] - finite[inside].half().float()).abs().max() > 0
    assert half[~inside].abs().max() == 65504


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_fp8(dtype, largest):
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert same(converted(every, torch.float32), every.float())
    assert same(converted(every, torch.bfloat16), every.bfloat16())
    x, _ = bit_pairs(torch.float32)
    near = torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 100
    for values in (x, near):
        assert same(converted(values, dtype), values.clamp(-largest, largest).to(dtype))


@pytest.mark.parametrize("source", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [torch.int32, torch.int64])
def test_float_to_integer_truncates_and_saturates(source, target):
    limits = torch.iinfo(target)
    inf = float("inf")
    values = torch.tensor([0.0, 1.9, -1.9, 255.7, 60000.0, -60000.0, float("nan"), inf, -inf]).to(source)
    expected = [0, 1, -1, int(values[3]), int(values[4]), int(values[5]), 0, limits.max, limits.min]
    assert converted(values, target).tolist() == expected
    if source != torch.float16:
        beyond = torch.tensor([3e19, -3e19, 2.0**31, -(2.0**31)], dtype=source)
        inside = [2**31, -(2**31)] if target == torch.int64 else [limits.max, limits.min]
        assert converted(beyond, target).tolist() == [limits.max, limits.min, *inside]


def test_integer_to_float_rounds_to_nearest_even():
    values = torch.tensor([2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**31 - 1, 257, 259])
    assert same(converted(values.to(torch.int32), torch.float32), values.float())
    assert same(converted(values.to(torch.int32), torch.float64), values.double())
    assert same(converted(values.to(torch.int32), torch.bfloat16), values.float().bfloat16())
    big = torch.tensor([2**63 - 1, 2**53 + 1, -(2**53) - 1])
    assert same(converted(big, torch.float64), big.double())
    assert same(converted(big, torch.float32), big.float())


# float arithmetic


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_one_rounding(dtype, operation):
    x, y = bit_pairs(dtype)
    expected = {"add": x + y, "sub": x - y, "mul": x * y}
    assert same(apply(x, y, operation), expected[operation])


def test_division_and_square_root():
    x, y = bit_pairs(torch.float32)
    assert same(apply(x, y, "div"), x / y)
    assert same(apply(x, y, "div_rn"), x / y)
    a, b = bit_pairs(torch.float64)
    assert same(apply(a, b, "div"), a / b)

    @triton.jit
    def root(x, out, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(out + i, tl.sqrt_rn(tl.load(x + i)))

    out = torch.empty_like(x)
    root[(1,)](x, out, BLOCK=x.numel())
    with np.errstate(invalid="ignore"):
        assert same(out, torch.from_numpy(np.sqrt(x.numpy())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comparisons_with_nan(dtype):
    x, y = bit_pairs(dtype)
    x[:4] = float("nan")
    assert torch.equal(apply(x, y, "less", torch.bool), x < y)
    assert torch.equal(apply(x, y, "not_equal", torch.bool), x != y)


def test_minimum_and_maximum_with_nan():
    nan = float("nan")
    x, y = torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([1.0, nan, nan, 3.0])
    assert same(apply(x, y, "maximum"), torch.tensor([1.0, 1.0, nan, 3.0]))
    assert same(apply(x, y, "minimum_nan"), torch.tensor([nan, nan, nan, 2.0]))


@triton.jit
def multiply_add(x, y, z, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fma_rounds_once(dtype):
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(512).astype(dtype) for _ in range(2))
    z = (-(x * y) * (1 + random.integers(-1, 2, 512) * np.finfo(dtype).eps)).astype(dtype)  # cancels almost everything
    z[::3] = random.standard_normal(z[::3].size).astype(dtype) * dtype(1000)
    x[-1], y[-1], z[-1] = 1 + np.finfo(dtype).eps, 1, 2.0 ** (np.finfo(dtype).minexp // 2)
    out = torch.empty(512, dtype=torch.from_numpy(x).dtype)
    multiply_add[(1,)](*(torch.from_numpy(a) for a in (x, y, z)), out, BLOCK=512)
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    assert out.tolist() == [float(nearest(value, dtype)) for value in exact]


@pytest.mark.parametrize(
    ("y", "z", "expected"),
    [
        (1 + 2.0**-12, 2.0**-80, 1 + 2.0**-11 + 2.0**-23),  # x * y is a tie that rounds down; z lifts it
        (1 + 2.0**-12, -(2.0**-80), 1 + 2.0**-11),
        (1 + 3 * 2.0**-12, 2.0**-80, 1 + 2.0**-10 + 2.0**-22),
        (1 + 3 * 2.0**-12, -(2.0**-80), 1 + 2.0**-10 + 2.0**-23),  # a tie that rounds up; z lowers it
    ],
)
def test_fma_sees_what_float64_cannot_hold(y, z, expected):
    x = torch.tensor([1 + 2.0**-12, -1 - 2.0**-12])
    out = torch.empty(2)
    multiply_add[(1,)](x, torch.tensor([y, y]), torch.tensor([z, -z]), out, BLOCK=2)
    assert out.tolist() == [expected, -expected]


def test_fma_in_bfloat16_rounds_once():
    x, y = torch.tensor([1 + 2.0**-7, 1 + 2.0**-4]).bfloat16(), torch.tensor([1 + 2.0**-6, 1 + 2.0**-4]).bfloat16()
    z = torch.tensor([-1.0, 2.0**-30]).bfloat16()  # the second product is a tie, which z decides
    out = torch.empty(2, dtype=torch.bfloat16)
    multiply_add[(1,)](x, y, z, out, BLOCK=2)
    assert out.tolist() == [2.0**-6 + 2.0**-7 + 2.0**-13, 1.125 + 2.0**-7]


# integer arithmetic

INTEGERS = [0, 1, 2, 3, 7, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**33 + 5]
INTEGERS += [2**62, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint32, torch.int64, torch.uint64])
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "umulhi", "floordiv", "mod"])
def test_integers_wrap(dtype, operation):
    width, signed = dtype.itemsize * 8, dtype in (torch.int32, torch.int64)
    values = sorted({value % 2**width for value in INTEGERS})

    def as_signed(value: int) -> int:
        return value - 2**width if signed and value >= 2 ** (width - 1) else value

    pairs = list(itertools.product(values, values))
    if operation in ("floordiv", "mod"):
        pairs = [(a, b) for a, b in pairs if b and not (signed and b == 2**width - 1)]
    pairs += [(1, 1)] * (triton.next_power_of_2(len(pairs)) - len(pairs))

    def expected(a: int, b: int) -> int:
        left, right = as_signed(a), as_signed(b)
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1) if right else 0
        return as_signed(
            {
                "add": a + b,
                "sub": a - b,
                "mul": a * b,
                "umulhi": a * b >> width,
                "floordiv": quotient,
                "mod": left - quotient * right,
            }[operation]
            % 2**width
        )

    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    x, y = (torch.from_numpy(np.array(column, np.uint64).astype(numpy_dtype)) for column in zip(*pairs, strict=True))
    assert apply(x, y, operation).tolist() == [expected(a, b) for a, b in pairs]


def test_shifts():
    x = torch.tensor([-8, 7, -(2**31), 2**31 - 1], dtype=torch.int32)
    y = torch.tensor([1, 31, 31, 1], dtype=torch.int32)
    assert apply(x, y, "shr").tolist() == [-4, 0, -1, 2**30 - 1]
    assert apply(x, y, "shl").tolist() == [-16, -(2**31), 0, -2]
    unsigned = torch.from_numpy(x.numpy().view(np.uint32))
    assert apply(unsigned, torch.from_numpy(y.numpy().view(np.uint32)), "shr").tolist() == [2**31 - 4, 0, 1, 2**30 - 1]


# arguments


@triton.jit
def scale(x, factor, offset, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, (tl.load(x + i) * factor).to(out.dtype.element_ty))
    tl.store(out + BLOCK, (offset + offset).to(out.dtype.element_ty))


def test_a_python_float_arrives_as_float32():
    out = torch.empty(3, dtype=torch.float64)
    scale[(1,)](torch.ones(2, dtype=torch.float64), 0.1, 1.0, out, BLOCK=2)
    assert out[0] == torch.tensor(0.1).double()
    wide = torch.empty(3)
    scale[(1,)](torch.ones(2, dtype=torch.bfloat16), 0.1, 1.0, wide, BLOCK=2)
    assert wide[0] == torch.tensor(0.1)  # float32 times bfloat16 is float32


def test_integer_arguments_take_the_width_of_a_launch():
    out = torch.empty(3, dtype=torch.int64)
    scale[(1,)](torch.ones(2, dtype=torch.int64), 3_000_000_000, 3_000_000_000, out, BLOCK=2)
    assert out.tolist() == [3_000_000_000, 3_000_000_000, 6_000_000_000]
    scale[(1,)](torch.ones(2, dtype=torch.int64), 1, 2_000_000_000, out, BLOCK=2)
    assert out[2] == 4_000_000_000 - 2**32  # int32 wraps

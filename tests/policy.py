"""The acceptance policies P1-P6 as assertions. Truth is float64 on the dtype-rounded inputs.

P1 assert_relative     error (relative Frobenius norm) against the best torch kernel and the rounding floor
P2 `cap` argument      absolute caps, so that a weak torch kernel cannot hide a weak one of ours
P3 assert_elementwise  a bound per element, which catches one wrong value that a norm hides
P4 integers            small-integer inputs: every dtype's result is exact, compare with assert_bitwise
P5 assert_bitwise      run to run, thread counts, batch slices, layouts
P6 assert_nonfinite    NaN and infinity land where the reference has them
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)

# Relative Frobenius error of correct rounding.
FLOOR = {torch.bfloat16: 1.65e-3, torch.float16: 2.06e-4, torch.float32: 2.5e-8, torch.float64: 4.6e-17}
MARGIN = {"forward": 1.10, "gradient": 1.25}
# float64 is both truth and result: only agreement to a few hundred ulps can be asked for.
FLOAT64_ERROR = 2e-14


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth|| in float64; 0 for two zero tensors."""
    truth = truth.double()
    norm = truth.norm().item()
    error = (got.double() - truth).norm().item()
    return error / norm if norm > 0 else error


def assert_relative(
    got: torch.Tensor,
    truth: torch.Tensor,
    torch_results: Iterable[torch.Tensor] = (),
    *,
    kind: str = "forward",
    cap: float | None = None,
    what: str = "",
) -> None:
    """P1: error <= max(best torch kernel's error, margin * rounding floor), and P2: <= cap when given.

    Args:
        got: our result. truth: float64 reference. torch_results: results of torch's kernels in got's dtype.
        kind: "forward" or "gradient", chooses the margin.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    error = relative_error(got, truth)
    if got.dtype is torch.float64:
        assert error <= FLOAT64_ERROR, f"{what}: float64 relative error {error:.2e} > {FLOAT64_ERROR:.0e}"
        return
    errors = [relative_error(result, truth) for result in torch_results]
    floor = MARGIN[kind] * FLOOR[got.dtype]
    limit = max([floor, *([min(errors)] if errors else [])])
    assert error <= limit, (
        f"{what}: {got.dtype} relative error {error:.3e} > {limit:.3e} (torch {errors}, floor {floor:.2e})"
    )
    if cap is not None:
        assert error <= cap, f"{what}: {got.dtype} relative error {error:.3e} > cap {cap:.1e}"


def ulp(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Spacing of dtype's numbers around each value of a float64 tensor."""
    info = torch.finfo(dtype)
    exponent = truth.abs().clamp(min=info.tiny).log2().floor()
    return torch.exp2(exponent) * info.eps


def assert_elementwise(got, truth, magnitude, terms: int, what: str = "") -> None:
    """P3: |got - truth| <= 4 sqrt(terms) 2^-24 magnitude + 0.51 ulp.

    Args:
        magnitude: the op applied to absolute values, float64. terms: how many products one element sums.
    """
    unit = 2.0**-53 if got.dtype is torch.float64 else 2.0**-24
    bound = 4 * terms**0.5 * unit * magnitude.double() + 0.51 * ulp(truth.double(), got.dtype)
    excess = ((got.double() - truth.double()).abs() - bound).max().item() if truth.numel() else -1.0
    assert excess <= 0, f"{what}: an element exceeds its error bound by {excess:.3e}"


def integers(shape, dtype=torch.float32, *, low: int = -3, high: int = 3, device="cpu") -> torch.Tensor:
    """P4: integer-valued data; sums of their products are exact in every dtype as long as they stay small."""
    return torch.randint(low, high + 1, tuple(shape), device=device).to(dtype)


def assert_bitwise(a: torch.Tensor, b: torch.Tensor, what: str = "") -> None:
    """P5: the same shape, dtype and bits (a NaN equals a NaN)."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"{what}: dtypes {a.dtype} and {b.dtype}"
    same = (a == b) | (a.isnan() & b.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {a.numel()} elements differ"


def assert_nonfinite(got: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """P6: NaN, +inf and -inf stand where the float64 reference has them."""
    for name, mask in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = int((mask(got.double()) != mask(truth.double())).sum())
        assert wrong == 0, f"{what}: {name} differs from the reference in {wrong} places"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with this many intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def truth_of(fn, *tensors: torch.Tensor | None, grad_output: torch.Tensor | None = None):
    """(output, gradients) of fn in float64 on float64 copies; gradients are None without grad_output."""
    leaves = [None if t is None else t.detach().double().requires_grad_(t.is_floating_point()) for t in tensors]
    return _run(fn, leaves, grad_output)


def run(fn, *tensors: torch.Tensor | None, grad_output: torch.Tensor | None = None):
    """(output, gradients) of fn on detached copies that keep dtype and strides."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    return _run(fn, leaves, grad_output)


def _run(fn, leaves, grad_output):
    output = fn(*leaves)
    if grad_output is None:
        return output.detach(), None
    inputs = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(output, inputs, grad_output.to(output.dtype), allow_unused=True))
    return output.detach(), [None if leaf is None else next(grads) for leaf in leaves]

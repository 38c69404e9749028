"""Gradients of 16-bit attention where the rounding of its output would be seen: delta = sum_j P_ij dP_ij is not dO . O.

It would in rows of few keys with all the weight, where values have a large mean, and where keys have one.
"""

import math

import pytest
import torch
from policy import LOW_PRECISION, assert_bitwise, assert_relative, run, threads, truth_of
from test_scaled_dot_product_attention_options import reference

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

# scale of the scores (None: 1 / sqrt(D)), means of values and keys in standard deviations
DATA = {"steep": (1.0, 0, 0), "values": (None, 3, 0), "keys": (None, 0, 3), "both": (None, 3, 3)}
OPTIONS = {
    "none": {},
    "causal": {"window": (-1, 0), "alignment": "lower_right"},
    "window": {"window": (700, 300), "alignment": "lower_right"},
    "bool": {"mask": "bool"},
    "padding": {"mask": "padding"},
    "bias": {"mask": "bias"},
    "soft cap": {"softcap": 20.0},
    "sinks": {"sinks": True},
}


def operands(dtype, data, queries, keys, dim, heads=2, key_heads=1):
    """(query times what makes its scores as steep as wanted, key, value, gradient of the output)."""
    scale, value_mean, key_mean = DATA[data]
    query, grad = (torch.randn(1, heads, queries, dim) for _ in range(2))
    key, value = (torch.randn(1, key_heads, keys, dim) + mean * torch.randn(dim) for mean in (key_mean, value_mean))
    query *= 1 if scale is None else scale * math.sqrt(dim)
    return [t.to(dtype) for t in (query, key, value, grad)]


def check(dtype, data, option, queries, keys, dim):
    """P1 for all gradients: no torch kernel is asked, only the rounding floor."""
    query, key, value, grad = operands(dtype, data, queries, keys, dim)
    options = dict(OPTIONS[option])
    sinks = torch.randn(2) if options.pop("sinks", False) else None
    kind = options.pop("mask", None)
    mask = torch.rand(1, 1, queries, keys) > 0.3 if kind == "bool" else None
    mask = torch.arange(keys) < keys - 50 if kind == "padding" else mask
    bias = torch.randn(1, 2, queries, keys).to(dtype) if kind == "bias" else None

    def ours(q, k, v, m, s):
        return attention(q, k, v, mask if m is None else m, sinks=s, enable_gqa=True, **options)

    def formula(q, k, v, m, s):
        return reference(q, k, v, mask if m is None else m, s, **options)[0]

    inputs = (query, key, value, bias, sinks)
    grads = run(ours, *inputs, grad_output=grad)[1]
    truths = truth_of(formula, *inputs, grad_output=grad)[1]
    for got, truth, name in zip(grads, truths, ("query", "key", "value", "bias"), strict=False):
        if got is not None:
            assert_relative(got, truth, kind="gradient", what=f"grad_{name}")
    if sinks is not None:
        torch.testing.assert_close(grads[4].double(), truths[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_accuracy(cpu_kernels, dtype, data, option):
    """P1 where the keys of a query are in several blocks."""
    check(dtype, data, option, 150, 1100, 32)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(3, 1500, 40), (70, 1025, 64), (200, 2048, 128)])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_accuracy_of_shapes(cpu_kernels, dtype, queries, keys, dim, data):
    check(dtype, data, "none", queries, keys, dim)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_accuracy_of_a_few_steep_rows(cpu_kernels, dtype):
    """They would be the largest errors among many rows with small gradients; and dropout draws the same weights."""
    query, key, value, grad = operands(dtype, "keys", 150, 1300, 64)
    query[:, :, ::20] *= 8
    keep = torch.ops.pynn.scaled_dot_product_attention_keep(query, key, torch.tensor([5, 0]), 0.25)

    def formula(q, k, v):
        weights = (q @ k.mT / math.sqrt(64)).softmax(-1)
        return (weights * keep / 0.75) @ v

    def ours(q, k, v):
        return attention(q, k, v, dropout_p=0.25, seed=5, enable_gqa=True)

    grads = run(ours, query, key, value, grad_output=grad)[1]
    truths = truth_of(formula, query, key, value, grad_output=grad)[1]
    for got, truth, name in zip(grads, truths, ("query", "key", "value"), strict=True):
        assert_relative(got, truth, kind="gradient", what=f"grad_{name}")


@pytest.mark.parametrize("option", ["none", "causal", "bias", "soft cap"])
@pytest.mark.parametrize("data", ["steep", "both"])
def test_bitwise(cpu_kernels, data, option):
    """P5: for any number of threads, when keys are split over them too, and for slices of the batch."""
    dtype = torch.bfloat16
    parts = [operands(dtype, data, 100, 1100, 16) for _ in range(2)]
    query, key, value, grad = (torch.cat(t) for t in zip(*parts, strict=True))
    query[1, :, ::3] *= 0.1  # rows that lack nothing between others
    options = dict(OPTIONS[option])
    mask = torch.randn(100, 1100).to(dtype) if options.pop("mask", None) else None

    def ours(q, k, v, m):
        return attention(q, k, v, m, enable_gqa=True, **options)

    first = run(ours, query, key, value, mask, grad_output=grad)[1]
    for count in (1, 2, 3, 5):
        with threads(count):
            again = run(ours, query, key, value, mask, grad_output=grad)[1]
        for a, b in zip(again, first, strict=True):
            assert a is None or assert_bitwise(a, b, f"{count} threads") is None
    sliced = run(ours, query[1:], key[1:], value[1:], mask, grad_output=grad[1:])[1]
    for a, b in zip(sliced[:3], first[:3], strict=True):
        assert_bitwise(a, b[1:], "slice")


@pytest.mark.parametrize("data", DATA)
def test_what_is_hidden_is_not_seen(cpu_kernels, data):
    """P6: NaN in keys and values that a mask, a window or the end of a sequence hides changes no bit."""
    query, key, value, grad = operands(torch.bfloat16, data, 90, 1300, 16)
    hidden = slice(1100, 1300)
    rows = torch.rand(90, 1300) > 0.3
    rows[:, hidden] = False
    for options in ({"attn_mask": rows}, {"attn_mask": rows[:1]}, {"window": (-1, 1009)}):
        grads = []
        for poison in (None, math.nan, math.inf):
            k, v = key.clone(), value.clone()
            if poison is not None:
                k[:, :, hidden] = v[:, :, hidden] = poison
            grads.append(
                run(lambda *x, o=options: attention(*x, enable_gqa=True, **o), query, k, v, grad_output=grad)[1]
            )
        for got in grads[1:]:
            for a, b in zip(got, grads[0], strict=True):
                assert_bitwise(a, b)


def test_queries_without_keys_give_no_gradient(cpu_kernels):
    """P6: whatever the gradient of their output holds."""
    query, key, value, grad = operands(torch.bfloat16, "both", 90, 1300, 16)
    mask = torch.rand(90, 1300) > 0.3
    mask[40] = False
    grad[:, :, 40] = math.nan
    for sinks in (None, torch.tensor([0.5, -math.inf])):
        grads = run(
            lambda *x, s=sinks: attention(*x, mask, sinks=s, enable_gqa=True), query, key, value, grad_output=grad
        )
        assert (grads[1][0][:, :, 40] == 0).all()
        assert all(g.isfinite().all() for g in grads[1])

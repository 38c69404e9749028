"""Attention of a few queries over many keys, as in decoding."""

import math

import pytest
import torch
from adversary import layouts
from policy import DTYPES, assert_bitwise, assert_elementwise, assert_relative, integers, run, threads, truth_of
from test_scaled_dot_product_attention import magnitude, make_mask, reference, torch_results
from test_scaled_dot_product_attention_options import operands
from test_scaled_dot_product_attention_options import reference as formula_of_options

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

KERNEL = "scaled_dot_product_attention_fwd"


@pytest.mark.parametrize("kind", ["none", "bool", "padding", "float"])
@pytest.mark.parametrize("shape", [(16, 4, 2, 1, 70, 40, 24), (8, 4, 2, 2, 1100, 40, 24)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_decoding(backend, dtype, shape, kind):
    """P1 and P3 for a few queries over many keys."""
    batch, heads, key_heads, queries, keys, dim, value_dim = shape
    if backend.name in ("sim", "interpret") and keys > 1000:  # few numbers to compare, were it less
        batch = batch // 4
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key = torch.randn(batch, key_heads, keys, dim).to(dtype)
    value = torch.randn(batch, key_heads, keys, value_dim).to(dtype)
    mask = make_mask(kind, batch, heads, queries, keys, dtype)
    mask64 = mask.double() if mask is not None and mask.is_floating_point() else mask
    output = attention(query, key, value, mask, enable_gqa=True)
    truth = reference(query.double(), key.double(), value.double(), mask64)
    peers = torch_results(query, key, value, mask, False, torch.zeros_like(output))
    assert_relative(output, truth, [p[0] for p in peers], what=kind)
    size = magnitude(query.double(), key.double(), value.double(), mask64)
    assert_elementwise(output, truth, size, keys + dim, what=kind)


@pytest.mark.parametrize(("queries", "keys", "dim"), [(1, 300, 64), (7, 530, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_gradients_of_few_queries(backend, dtype, queries, keys, dim):
    """P1 for the path of the CPU kernels that packs no keys."""
    if backend.name != "cpu":
        pytest.skip("GPU kernels have no such path")
    batch = 64 // queries
    query, key, value, grad = (torch.randn(batch, 4, n, dim).to(dtype) for n in (queries, keys, keys, queries))
    grads = run(attention, query, key, value, grad_output=grad)[1]
    truths = truth_of(reference, query, key, value, grad_output=grad)[1]
    peers = torch_results(query, key, value, None, False, grad)
    for i, name in enumerate(("query", "key", "value")):
        assert_relative(grads[i], truths[i], [p[1][i] for p in peers], kind="gradient", what=f"grad_{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_of_few_queries(backend, dtype):
    """P5: the same output and gradients for every layout of the operands, and for any number of threads."""
    sizes = (2, 6) if backend.name == "cpu" else (1, 2)
    tensors = [torch.randn(*sizes, n, 24).to(dtype) for n in (3, 100, 100, 3)]
    expected = run(attention, *tensors[:3], grad_output=tensors[3])
    for i, base in enumerate(tensors):
        for name, changed in layouts(base):
            *inputs, grad = (changed if j == i else t for j, t in enumerate(tensors))
            for count in (1, 2, 3) if backend.name == "cpu" else (1,):
                with threads(count):
                    output, grads = run(attention, *inputs, grad_output=grad)
                for a, b in zip((output, *grads), (expected[0], *expected[1]), strict=True):
                    assert_bitwise(a, b, f"operand {i}, {name}, {count} threads")


# heads, key heads, queries, keys, dim, value dim: several parts of the keys on a GPU, the last one short or of one key,
# rows of a group in one tile and in two, heads as wide as one block of columns and wider.
PARTS = [(4, 1, 1, 2049, 40, 24), (6, 2, 3, 700, 64, 64), (2, 2, 16, 257, 128, 136), (20, 1, 1, 513, 16, 16)]
MIXED = {
    "plain": {},
    "steep": {"softcap": None, "scale": 1.5},  # a few keys, and the parts that hold them, have all the weight
    "window": {"window": (300, 20), "alignment": "lower_right", "sinks": True},  # leaves out whole parts
    "bool": {"mask": "bool", "softcap": 2.0, "alibi": True},
    "float": {"mask": "float", "window": (-1, 0), "alignment": "lower_right", "alibi": True, "sinks": True},
}


def mixed(kind, batch, shape, dtype):
    """(query, key, value), and attention and the formula for them with the options of a kind: both give (out, lse)."""
    heads, _, queries, keys, dim, _ = shape
    inputs = operands(batch, *shape, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    chosen = dict(MIXED[kind])
    slopes = torch.rand(batch, heads) / 100 if chosen.pop("alibi", False) else None
    sinks = torch.randn(batch, heads, dtype=wide) if chosen.pop("sinks", False) else None
    mask = chosen.pop("mask", None)
    if mask:
        hidden = torch.rand(batch, heads, queries, keys) > 0.6
        hidden[..., 260:520] = True  # a part without a key to see
        hidden[0, 0, 0] = True  # a query without one
        if mask == "float":
            mask = torch.randn(hidden.shape).to(dtype).masked_fill(hidden, -math.inf)
        else:
            mask = ~hidden

    def ours(q, k, v, m=mask, part=slice(None)):
        of_part = {
            "alibi_slopes": None if slopes is None else slopes[part],
            "sinks": None if sinks is None else sinks[part],
        }
        m = None if m is None else m[part]
        return attention(q[part], k[part], v[part], m, enable_gqa=True, return_lse=True, **of_part, **chosen)

    def formula(q, k, v):
        options = {name: x for name, x in chosen.items() if name != "scale"}
        factor = chosen.get("scale", dim**-0.5) * dim**0.5
        m = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        return formula_of_options(q * factor, k, v, m, sinks, slopes, **options)

    return inputs, ours, formula


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("shape", PARTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_parts(backend, dtype, shape, kind):
    """P1 with every option; a query without a key gets 0, and -inf as its log-sum-exp."""
    batch = max(1, 1024 // (shape[0] * shape[2] * shape[5]))  # errors are compared over so many numbers
    inputs, ours, formula = mixed(kind, batch, shape, dtype)
    output, lse = ours(*inputs)
    truth, truth_lse = formula(*(t.double() for t in inputs))
    assert_relative(output, truth, [formula(*inputs)[0]], what=kind)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["window", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_of_parts(backend, dtype, kind):
    """P5: for any slice of the batch, for every layout of the queries of a group, and run to run."""
    inputs, ours, _ = mixed(kind, 3, (4, 2, 3, 700, 16, 24), dtype)
    expected = ours(*inputs)
    for part in (slice(0, 1), slice(1, 3), slice(2, None)):
        for got, whole in zip(ours(*inputs, part=part), expected, strict=True):
            assert_bitwise(got, whole[part], f"{part}")
    for order in ((0, 2, 1, 3), (2, 1, 0, 3), (3, 2, 1, 0)):  # of the dimensions in memory; all are their own inverse
        moved = (t.permute(order).contiguous().permute(order) for t in inputs)
        for got, whole in zip(ours(*moved), expected, strict=True):
            assert_bitwise(got, whole, f"{order}")
    for _ in range(3 if backend.name == "interpret" else 50):
        for got, whole in zip(ours(*inputs, part=slice(1, 2)), expected, strict=True):
            assert_bitwise(got, whole[1:2], "again")


@pytest.mark.parametrize("keys", [1281, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_parts(backend, dtype, keys):
    """P4: with zero queries every key weighs 1 / keys, so integer values give correctly rounded means."""
    batch, key_heads = (2, 2) if keys < 10000 else (1, 1)
    query = torch.zeros(batch, 3 * key_heads, 2, 8, dtype=dtype)
    key, value = torch.ones(batch, key_heads, keys, 8, dtype=dtype), integers((batch, key_heads, keys, 24), dtype)
    output = attention(query, key, value, enable_gqa=True)
    expected = (value.double().sum(-2, keepdim=True) / keys).to(dtype)
    assert_bitwise(output, expected.repeat_interleave(3, 1).expand_as(output))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_parts(backend, dtype):
    """P6: NaN and infinity behind a mask or a window change no bit; what is seen of them stays in its place."""
    (query, key, value), ours, _ = mixed("bool", 1, (4, 2, 2, 700, 16, 24), dtype)
    expected = ours(query, key, value)
    for poison in (math.nan, math.inf, -math.inf):
        k, v = key.clone(), value.clone()
        k[..., 300:310, :] = v[..., 300:310, :] = poison
        for got, whole in zip(ours(query, k, v), expected, strict=True):
            assert_bitwise(got, whole, f"{poison}")
    query[:, 1, 1] = math.nan
    value[:, 1, 600, 3] = math.inf
    output = attention(query, key, value, window=(-1, 650), enable_gqa=True)
    assert output[:, 1, 1].isnan().all()
    assert not output[:, 2:, :, 3].isfinite().any()
    output[:, 1, 1] = output[:, 2:, :, 3] = 0
    assert output.isfinite().all()
    hidden = attention(query, key, value, window=(-1, 590), enable_gqa=True)
    assert hidden[:, 2:].isfinite().all()


def test_dropout_of_parts(backend):
    """Dropout keeps the weights that scaled_dot_product_attention_keep says; gradients from the merged results."""
    query, key, value = operands(2, 4, 2, 3, 600, 16, 24, torch.float32)
    grad = torch.randn(2, 4, 3, 24)
    keep = torch.ops.pynn.scaled_dot_product_attention_keep(query, key, torch.tensor([7, 0]), 0.25)

    def ours(q, k, v):
        return attention(q, k, v, dropout_p=0.25, seed=7, enable_gqa=True)

    def formula(q, k, v):
        return reference(q, k, v, keep=keep, dropout_p=0.25)

    output, grads = run(ours, query, key, value, grad_output=grad)
    truth, truth_grads = truth_of(formula, query, key, value, grad_output=grad)
    torch.testing.assert_close(output.double(), truth, rtol=3e-6, atol=3e-6)
    for got, expected in zip(grads, truth_grads, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_packed_parts(backend, dtype):
    """Packed sequences whose keys begin in the middle of a part: each as on its own."""
    lengths, caches = [1, 0, 3, 2], [300, 5, 420, 31]
    starts = [torch.tensor([0, *n]).cumsum(0).to(torch.int32) for n in (lengths, caches)]
    query, key, value = operands(1, 4, 2, sum(lengths), sum(caches), 16, 24, dtype)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    options = {"is_causal": True, "alignment": "lower_right", "alibi_slopes": slopes, "enable_gqa": True}
    output = attention(query, key, value, cu_seqlens=tuple(starts), **options)
    for n in range(len(lengths)):
        rows, columns = (slice(int(s[n]), int(s[n + 1])) for s in starts)
        alone = attention(
            *(t.double() for t in (query[:, :, rows], key[:, :, columns], value[:, :, columns])), **options
        )
        tolerance = {torch.float64: 1e-12, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(output[:, :, rows].double(), alone, rtol=tolerance, atol=tolerance)

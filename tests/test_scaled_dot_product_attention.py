"""scaled_dot_product_attention against a float64 reference, torch's kernels, and everything that breaks kernels."""

import math

import pytest
import torch
import transforms
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import (
    DTYPES,
    LOW_PRECISION,
    assert_bitwise,
    assert_elementwise,
    assert_nonfinite,
    assert_relative,
    integers,
    run,
    threads,
    truth_of,
)
from test_random import philox
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

INFINITY = math.inf
ops = torch.ops.pynn


def reference(query, key, value, mask=None, *, causal=False, scale=None, keep=None, dropout_p=0.0):
    """The formula in torch ops. Rows without a key give 0; what a masked key holds has no influence."""
    group = query.shape[-3] // key.shape[-3] if query.dim() > 2 and key.shape[-3] else 1
    if group > 1:
        key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = query @ key.mT * (1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale)
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    if causal:
        hidden = ~torch.ones_like(hidden).tril()
    elif mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == -INFINITY
        if mask.dtype != torch.bool:
            scores = scores + mask.masked_fill(hidden, 0)
    empty = hidden.expand_as(scores).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, -INFINITY).masked_fill(empty, 0).softmax(-1).masked_fill(hidden, 0)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p)
    return weights @ value


def magnitude(query, key, value, mask=None, **options):
    """Bound of the terms that an output element sums, times the growth of an error in the scores."""
    options.pop("dropout_p", None), options.pop("keep", None)
    weights_times_values = reference(query, key, value.abs(), mask, **options)
    group = query.shape[-3] // key.shape[-3] if query.dim() > 2 else 1
    repeated = key.repeat_interleave(group, -3) if group > 1 else key
    logits = (query.abs() @ repeated.abs().mT).amax(-1, keepdim=True) / math.sqrt(query.shape[-1])
    return weights_times_values * (2 + logits)


def torch_results(query, key, value, mask, causal, grad_output):
    """(output, gradients) of each torch kernel that takes these arguments, in the dtype of query."""
    group = query.shape[-3] // key.shape[-3]
    results = []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):

        def peer(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=group > 1)

        try:
            with sdpa_kernel(kernel):
                results.append(run(peer, query, key, value, grad_output=grad_output))
        except RuntimeError:
            continue  # this kernel has no support for the arguments
    return results


GRID = [  # batch, heads, key heads, queries, keys, dim, value dim
    (16, 4, 4, 16, 16, 16, 16),  # errors are compared over this many numbers at least
    (2, 4, 4, 49, 49, 32, 32),
    (8, 2, 2, 64, 64, 16, 16),
    (1, 4, 2, 65, 127, 64, 64),
    (1, 2, 1, 196, 300, 32, 24),
    (1, 2, 2, 70, 579, 40, 40),
    (4, 2, 2, 40, 1100, 16, 16),  # two blocks of keys
]


def make_mask(kind, batch, heads, queries, keys, dtype):
    if kind == "bool":
        mask = torch.rand(batch, 1, queries, keys) > 0.3
        mask[0, :, 0] = True
        return mask
    if kind == "padding":
        mask = torch.arange(keys) < torch.randint(1, keys + 1, (batch,))[:, None]
        return mask[:, None, None]
    if kind == "float":
        return torch.randn(heads, queries, keys).to(dtype)
    return None


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "padding", "float"])
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, kind):
    """P1 and P3: never a larger error than torch's best kernel, unless at the rounding floor."""
    batch, heads, key_heads, queries, keys, dim, value_dim = shape
    if backend.name in ("sim", "interpret") and queries * keys > 5000:  # emulated: the same blocks, for one key head
        batch = 1 if backend.name == "interpret" and kind != "causal" else batch  # errors of few queries need company
        heads, key_heads = heads // key_heads, 1
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key, value = (
        torch.randn(batch, key_heads, keys, dim).to(dtype),
        torch.randn(batch, key_heads, keys, value_dim).to(dtype),
    )
    mask, causal = make_mask(kind, batch, heads, queries, keys, dtype), kind == "causal"
    grad_output = torch.randn(batch, heads, queries, value_dim).to(dtype)
    mask64 = mask.double() if mask is not None and mask.is_floating_point() else mask

    def ours(q, k, v):
        return attention(q, k, v, mask, is_causal=causal, enable_gqa=heads != key_heads)

    output, grads = run(ours, query, key, value, grad_output=grad_output)
    truth, truth_grads = truth_of(
        lambda q, k, v: reference(q, k, v, mask64, causal=causal), query, key, value, grad_output=grad_output
    )
    peers = torch_results(query, key, value, mask, causal, grad_output)
    assert_relative(output, truth, [p[0] for p in peers], what=f"{kind} output")
    for i, name in enumerate(("query", "key", "value")):
        peer_grads = [p[1][i] for p in peers]
        assert_relative(grads[i], truth_grads[i], peer_grads, kind="gradient", what=f"{kind} grad_{name}")
    size = magnitude(query.double(), key.double(), value.double(), mask64, causal=causal)
    assert_elementwise(output, truth, size, keys + dim, what=kind)


SMALL = st.integers(1, 9)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(0, 2),
    group=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(0, 20),
    keys=st.integers(0, 40),
    dim=SMALL,
    value_dim=SMALL,
    kind=st.sampled_from(["none", "causal", "bool", "float", "dropout"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=2000)
def test_generated(data, dtype, batch, group, key_heads, queries, keys, dim, value_dim, kind, seed):
    """Random shapes, masks, groups and empty sizes: output and all gradients."""
    torch.manual_seed(seed)
    heads = group * key_heads
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key, value = (
        torch.randn(batch, key_heads, keys, dim).to(dtype),
        torch.randn(batch, key_heads, keys, value_dim).to(dtype),
    )
    mask = None
    if kind in ("bool", "float"):
        shape = [data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
        mask = torch.rand(shape) > 0.4
        if kind == "float":
            mask = torch.randn(shape).to(dtype).masked_fill(mask.logical_not(), -INFINITY)
    dropout = {"dropout_p": 0.25, "seed": seed} if kind == "dropout" else {}
    grad_output = torch.randn(batch, heads, queries, value_dim).to(dtype)

    def ours(q, k, v, m):
        m = mask if m is None else m
        return attention(q, k, v, m, is_causal=kind == "causal", enable_gqa=group > 1, **dropout)

    keep = None
    if dropout:
        keep = ops.scaled_dot_product_attention_keep(query, key, torch.tensor([seed, 0]), 0.25)

    def truth_fn(q, k, v, m):
        return reference(q, k, v, mask if m is None else m, causal=kind == "causal", keep=keep, dropout_p=0.25)

    float_mask = mask if kind == "float" else None
    output, grads = run(ours, query, key, value, float_mask, grad_output=grad_output)
    truth, truth_grads = truth_of(truth_fn, query, key, value, float_mask, grad_output=grad_output)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(output.double(), truth, rtol=tolerance, atol=tolerance)
    for got, expected in zip(grads, truth_grads, strict=True):
        if got is not None:
            expected = expected.nan_to_num() if got is grads[3] else expected
            torch.testing.assert_close(got.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(5, 7, 8), (17, 64, 16), (66, 300, 20), (5, 1500, 4), (3, 1, 1)])
def test_exact(backend, dtype, queries, keys, dim):
    """P4: with zero queries every key weighs 1 / keys, so integer values give correctly rounded means."""
    query = torch.zeros(2, 2, queries, dim, dtype=dtype)
    key = integers((2, 2, keys, dim), dtype)
    value = integers((2, 2, keys, dim), dtype)
    output = attention(query, key, value)
    expected = value.double().sum(-2, keepdim=True) / keys
    assert_bitwise(output, expected.expand(2, 2, queries, dim).to(dtype))
    causal = attention(query, key, value, is_causal=True)
    count = torch.arange(1, queries + 1).clamp(max=keys)[:, None]
    sums = value.double().cumsum(-2)[..., torch.arange(queries).clamp(max=keys - 1), :]
    assert_bitwise(causal, (sums / count).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, dtype):
    """P5: the same bits for every layout of every input and of grad_output, and of the mask."""
    tensors = [integers((2, 3, n, d), torch.float32).div(2).to(dtype) for n, d in ((5, 8), (7, 8), (7, 16), (5, 16))]
    mask = torch.randn(3, 5, 7).to(dtype)
    expected = run(attention, *tensors[:3], mask, grad_output=tensors[3])
    for i in range(5):
        base = mask if i == 4 else tensors[i]
        for name, changed in layouts(base):
            inputs = [changed if j == i else t for j, t in enumerate(tensors)]
            q, k, v, g = inputs[:4]
            output, grads = run(attention, q, k, v, changed if i == 4 else mask, grad_output=g)
            assert_bitwise(output, expected[0], f"operand {i}, {name}")
            for a, b in zip(grads, expected[1], strict=True):
                assert_bitwise(a, b, f"operand {i}, {name}")
    for value in (1.0, 0.0):
        ones = constant(tensors[3].shape, value, dtype)
        a = run(attention, *tensors[:3], grad_output=ones)[1]
        b = run(attention, *tensors[:3], grad_output=ones.contiguous())[1]
        for x, y in zip(a, b, strict=True):
            assert_bitwise(x, y, "expanded grad_output")


def test_packed_projection(backend):
    """query, key and value as slices of one (B, L, 3, H, D) projection; heads join without a copy."""
    packed = torch.randn(2, 16, 3, 4, 16, requires_grad=True)
    query, key, value = (t.transpose(1, 2) for t in packed.unbind(2))
    output = attention(query, key, value)
    assert output.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_canaries(backend, dtype):
    """Nothing is read or written around the operands."""
    shapes = [(1, 2, 5, 9), (1, 2, 7, 9), (1, 2, 7, 3), (5, 7), (1, 2, 5, 3)]
    guarded = [Canary(torch.randn(s).to(dtype)) for s in shapes]
    query, key, value, mask, grad = (c.tensor for c in guarded)
    output, grads = run(attention, query, key, value, mask, grad_output=grad)
    for c in guarded:
        c.assert_untouched()
    for t in (output, *grads):
        assert not t.isnan().any()


@pytest.mark.parametrize("kind", ["none", "causal", "float", "dropout"])
@pytest.mark.parametrize("shape", [(1, 1, 70, 1300, 16), (3, 2, 100, 40, 8), (3, 1, 2, 2100, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise(backend, dtype, shape, kind):
    """P5: run to run, for any number of threads, and for slices of the batch."""
    batch, heads, queries, keys, dim = shape
    query = torch.randn(batch, heads, queries, dim).to(dtype)
    key, value = torch.randn(batch, heads, keys, dim).to(dtype), torch.randn(batch, heads, keys, dim).to(dtype)
    mask = torch.randn(batch, 1, 1, keys).to(dtype) if kind == "float" else None
    grad_output = torch.randn(query.shape).to(dtype)
    dropout = {"dropout_p": 0.1, "seed": 5} if kind == "dropout" else {}

    def fn(q, k, v, m):
        return attention(q, k, v, m, is_causal=kind == "causal", **dropout)

    first = run(fn, query, key, value, mask, grad_output=grad_output)
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):  # of CPU threads
        with threads(count):
            again = run(fn, query, key, value, mask, grad_output=grad_output)
        assert_bitwise(again[0], first[0], f"{count} threads")
        for a, b in zip(again[1], first[1], strict=True):
            assert a is None or assert_bitwise(a, b, f"{count} threads") is None
    if kind == "dropout":
        return
    part = slice(batch - 1, batch)
    sliced = run(
        fn, query[part], key[part], value[part], None if mask is None else mask[part], grad_output=grad_output[part]
    )
    assert_bitwise(sliced[0], first[0][part], "slice")
    for a, b in zip(sliced[1][:3], first[1][:3], strict=True):
        assert_bitwise(a, b[part], "slice")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [9, 1100])
def test_masked_is_masked(backend, dtype, keys):
    """P6: NaN and infinity in masked keys and values, and in rows that do not see them, change no bit."""
    query, key, value, grad = (torch.randn(2, 2, n, 8).to(dtype) for n in (7, keys, keys, 7))
    mask = torch.rand(2, 1, 7, keys) > 0.3
    mask[..., 3] = False
    mask[1, 0, 2] = False  # a row without any key
    float_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -INFINITY)
    for m in (mask, float_mask):
        expected = run(lambda q, k, v, m=m: attention(q, k, v, m), query, key, value, grad_output=grad)
        assert (expected[0][1, :, 2] == 0).all()
        assert (expected[1][0][1, :, 2] == 0).all()
        for poison in (math.nan, INFINITY, -INFINITY):
            k, v = key.clone(), value.clone()
            k[..., 3, :] = v[..., 3, :] = poison
            got = run(lambda q, k, v, m=m: attention(q, k, v, m), query, k, v, grad_output=grad)
            assert_bitwise(got[0], expected[0], f"{poison}")
            for a, b in zip(got[1], expected[1], strict=True):
                assert_bitwise(a, b, f"{poison}")
    poisoned = query.clone()
    poisoned[:, :, 4] = math.nan
    got = run(lambda q, k, v: attention(q, k, v, is_causal=True), poisoned, key, value, grad_output=grad)
    assert got[0][:, :, 4].isnan().all()
    assert not got[0][:, :, :4].isnan().any()
    assert not got[1][1][:, :, 5:].isnan().any(), "a future key saw the NaN of an earlier query"


def test_nonfinite(backend):
    """P6: what is not masked propagates as in the formula."""
    query, key, value = (torch.randn(1, 1, 6, 8) for _ in range(3))
    for operand in (query, key, value):
        for poison in (math.nan, INFINITY):
            kept = operand.clone()
            operand[0, 0, 2, 1] = poison
            truth, _ = truth_of(reference, query, key, value)
            assert_nonfinite(attention(query, key, value), truth, f"{poison}")
            operand.copy_(kept)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_large_logits(backend, dtype):
    query, key = ((100 * torch.randn(1, 2, 33, 16)).to(dtype).requires_grad_() for _ in range(2))
    value = torch.randn(1, 2, 33, 16).to(dtype)
    output = attention(query, key, value, scale=1.0)
    grads = torch.autograd.grad(output.float().sum(), (query, key))
    assert all(g.isfinite().all() for g in grads)
    assert output.isfinite().all()


def test_very_negative_rows(backend):
    """pytorch#196678: rows whose log-sum-exp is below -88.7, with a mask, at 64 modulo 128 keys."""
    query = torch.full((1, 1, 64, 16), 3.0, requires_grad=True)
    key, value = torch.full((1, 1, 192, 16), -10.0, requires_grad=True), torch.randn(1, 1, 192, 16, requires_grad=True)
    mask = torch.ones(64, 192, dtype=torch.bool).tril(64)
    attention(query, key, value, mask).square().sum().backward()
    for t in (query, key, value):
        assert t.grad.isfinite().all()


def test_empty(backend):
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query = torch.randn(batch, 2, queries, 8, requires_grad=True)
        key, value = (torch.randn(batch, 2, keys, 8, requires_grad=True) for _ in range(2))
        mask = torch.randn(queries, keys, requires_grad=True)
        output = attention(query, key, value, mask)
        assert output.shape == query.shape
        assert (output == 0).all()
        output.sum().backward()
        for t in (query, key, value, mask):
            assert t.grad.shape == t.shape
            assert (t.grad == 0).all()


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
def test_ranks(backend, rank):
    lead = (2, 1, 3, 2)[: rank - 2]
    query, key, value = torch.randn(*lead, 5, 8), torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 4)
    for mask in (torch.rand(5, 7) > 0.3, torch.randn(*lead, 5, 7)):
        expected = reference(query, key, value, mask)
        torch.testing.assert_close(attention(query, key, value, mask), expected, rtol=1e-5, atol=1e-6)


def test_broadcast_leading_dimensions(backend):
    query = torch.randn(2, 3, 4, 8, requires_grad=True)
    key, value = torch.randn(1, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8, requires_grad=True)
    inputs = (query, key, value)
    output, expected = attention(*inputs), F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(output, expected)
    for a, b in zip(
        torch.autograd.grad(output.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.5, 3])
def test_scale(backend, scale):
    query, key, value = (torch.randn(1, 2, 9, 8) for _ in range(3))
    got = attention(query, key, value, scale=scale)
    torch.testing.assert_close(got, reference(query, key, value, scale=scale), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (1, 3, 5, 7), (3, 1, 7), (5, 1), (1, 1), (7,), (2, 3, 5, 7)], ids=str)
def test_mask_gradient(backend, shape):
    """Summed over every dimension in which the mask is broadcast."""
    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    mask, grad = torch.randn(shape), torch.randn(2, 3, 5, 8)
    got = run(attention, query, key, value, mask, grad_output=grad)[1][3]
    expected = truth_of(reference, query, key, value, mask, grad_output=grad)[1][3]
    assert got.shape == mask.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_dropout_mask_follows_its_definition(backend):
    query, key = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 7, 4)
    for p in (0.0, 0.1, 0.5, 1.0):
        keep = ops.scaled_dot_product_attention_keep(query, key, torch.tensor([12345678901234, 3]), p)
        words = [w for i in range(11) for w in philox(12345678901234, 3 + i)]
        assert keep.flatten().tolist() == [w >= int(p * 2**32) for w in words[:42]]


@pytest.mark.parametrize("shape", [(2, 2, 5, 7), (1, 2, 70, 1100)], ids=str)
def test_dropout(backend, shape):
    batch, heads, queries, keys = shape
    p, seed = 0.3, 11
    query = torch.randn(batch, heads, queries, 8)
    key, value = torch.randn(batch, heads, keys, 8), torch.randn(batch, heads, keys, 8)
    grad = torch.randn(query.shape)
    keep = ops.scaled_dot_product_attention_keep(query, key, torch.tensor([seed, 0]), p)
    got = run(
        lambda q, k, v: attention(q, k, v, dropout_p=p, seed=seed),
        query,
        key,
        value,
        grad_output=grad,
    )
    truth = truth_of(lambda q, k, v: reference(q, k, v, keep=keep, dropout_p=p), query, key, value, grad_output=grad)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(got[1], truth[1], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_dropout_statistics_and_seeding(backend):
    query, key = torch.randn(4, 4, 64, 8), torch.randn(4, 4, 64, 8)
    value = torch.ones(4, 4, 64, 8)
    torch.manual_seed(3)
    a = attention(query, key, value, dropout_p=0.2)
    b = attention(query, key, value, dropout_p=0.2)
    torch.manual_seed(3)
    assert_bitwise(attention(query, key, value, dropout_p=0.2), a)
    assert not torch.equal(a, b)
    assert abs(a.mean().item() - 1) < 0.02
    keep = ops.scaled_dot_product_attention_keep(query, key, torch.tensor([1, 0]), 0.2).double()
    assert abs(keep.mean().item() - 0.8) < 4 * (0.16 / keep.numel()) ** 0.5
    generator = torch.Generator().manual_seed(1)
    c = attention(query, key, value, dropout_p=0.2, generator=generator)
    generator.manual_seed(1)
    assert_bitwise(attention(query, key, value, dropout_p=0.2, generator=generator), c)
    assert (attention(query, key, value, dropout_p=1.0) == 0).all()


GRADCHECK = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])},
    "dropout": {"dropout_p": 0.3, "seed": 7},
    "grouped": {"enable_gqa": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("kind", [*GRADCHECK, "mask"])
def test_gradcheck(backend, kind):
    key_heads = 2 if kind == "grouped" else 4
    shapes = [(1, 4, 3, 3), (1, key_heads, 4, 3), (1, key_heads, 4, 2)] + ([(4, 1, 4)] if kind == "mask" else [])
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def fn(*args):
        return attention(*args, **GRADCHECK.get(kind, {}))

    fast = backend.name != "cpu"  # one random direction where every thread is emulated
    assert torch.autograd.gradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)
    assert torch.autograd.gradgradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)


def test_opcheck(backend):
    query, key, value = (torch.randn(2, 4, n, 8) for n in (3, 5, 5))
    mask, random, numbers = torch.randn(4, 1, 5), torch.tensor([1, 0]), torch.randn(2, 4)
    for attn_mask, dropout_key, per_head, options in (
        (None, None, None, (0.0, -1, 0, False, 0.4, 0.0)),
        (mask, random, None, (0.5, -1, -1, False, 0.4, 2.0)),
        (mask, None, numbers, (0.0, 2, 1, True, 0.4, 0.0)),
    ):
        ranges = (None, None) if per_head is None else (torch.zeros(3, 4).int(), torch.zeros(5, 2).int())
        args = (query, key, value, attn_mask, dropout_key, per_head, per_head, *ranges)
        torch.library.opcheck(ops.scaled_dot_product_attention_fwd.default, (*args, *options))
        out, lse = ops.scaled_dot_product_attention_fwd(*args, *options)
        grad_lse = None if per_head is None else torch.randn(lse.shape).to(lse.dtype)
        backward = (out, grad_lse, *args, out, lse, *options, attn_mask is not None, per_head is not None)
        torch.library.opcheck(ops.scaled_dot_product_attention_bwd.default, backward)
    torch.library.opcheck(ops.scaled_dot_product_attention_keep.default, (query, key, random, 0.5))


def test_transforms(backend):
    query, key, value = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    mask = torch.randn(2, 1, 7)
    transforms.assert_all(attention, query, key, value)
    transforms.assert_all(attention, query, key, value, mask)
    transforms.assert_all(lambda q, k, v: attention(q, k, v, dropout_p=0.5, seed=3), query, key, value)
    transforms.assert_compiles(
        lambda q, k, v: attention(q, k, v, is_causal=True), query, key, value, backend="inductor"
    )


def test_second_derivative_under_func(backend):
    x = torch.randn(4, 3, dtype=torch.float64)

    def hessian(fn):
        return torch.func.jacrev(torch.func.grad(lambda t: fn(t, t, t).square().sum()))

    torch.testing.assert_close(hessian(attention)(x), hessian(reference)(x))


def test_autocast(backend):
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output = attention(query, key, value, torch.zeros(5, 5))
    assert output.dtype is torch.bfloat16
    assert_bitwise(output, attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (1, 2, 6, 8)}, "value"),  # pytorch#193728: more values than keys
        ({"value": (1, 2, 4, 8)}, "value"),
        ({"key": (1, 2, 5, 7)}, "same last dimension"),
        ({"query": (8,)}, "at least 2 dimensional"),
        ({"attn_mask": torch.zeros(4, 5, dtype=torch.long)}, "Expected attn_mask dtype to be bool or float"),
        ({"attn_mask": torch.zeros(4, 6)}, "attn_mask"),
        (
            {"attn_mask": torch.zeros(4, 5), "is_causal": True},
            "Explicit attn_mask should not be set when is_causal=True",
        ),
        ({"dropout_p": 1.5}, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"dropout_p": -0.5}, "dropout probability has to be between 0 and 1"),
        ({"query": (1, 3, 4, 8), "enable_gqa": True}, "must divide the number of heads"),
        ({"key": torch.zeros(1, 2, 5, 8, dtype=torch.float64)}, "same dtype"),
        ({"key": torch.zeros(1, 2, 5, 8, device="meta")}, "same device"),
    ],
    ids=str,
)
def test_errors(backend, change, message):
    arguments = {"query": (1, 2, 4, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8), **change}
    arguments = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    with pytest.raises((RuntimeError, ValueError), match=message):
        attention(**arguments)


def bad_call(rng):
    """A call of an op with one argument spoiled."""
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    names = ["query", "key", "value", "attn_mask", "dropout_key", "alibi_slopes", "sinks", "key_ranges", "query_ranges"]
    options = ["dropout_p", "left", "right", "lower_right", "scale", "softcap"]
    arguments = [query, key, value, torch.randn(3, 5), torch.tensor([1, 2]), torch.rand(2, 4), torch.randn(2, 4)]
    arguments += [torch.tensor([[0, 5, 0, 0]] * 3).int(), torch.tensor([[0, 3]] * 5).int()]
    values = [0.5, 3, -1, rng.random() < 0.5, 0.3, 0.0]
    op, limit = ops.scaled_dot_product_attention_fwd, 9
    if rng.random() < 0.5:
        out, lse = op(*arguments, *values)
        op, limit = ops.scaled_dot_product_attention_bwd, 13
        names = ["grad_out", "grad_lse", *names, "out", "lse"]
        arguments = [torch.randn(out.shape), torch.randn(lse.shape).to(lse.dtype), *arguments, out, lse]
        options, values = [*options, "mask_gradient", "sinks_gradient"], [*values, True, True]
    names, arguments = [*names, *options], [*arguments, *values]
    i = rng.randrange(limit)
    x = arguments[i]
    kind = rng.choice(["rank", "unsqueeze", "size", "dtype", "device", "option", "huge", "empty"])
    if kind == "rank":
        x = x.flatten() if x.dim() > 1 else x[0]
    elif kind == "unsqueeze":
        x = x[(None,) * rng.randint(4, 6)]
    elif kind == "size":
        d = rng.randrange(x.dim())
        x = torch.cat([x] * rng.randint(2, 3), d)
        if (names[i], d) in (("value", 3), ("query", 1), ("query", 2)):  # would be accepted
            kind, x = "int8", x.to(torch.int8)
    elif kind == "dtype":
        choices = [torch.int32, torch.uint8, torch.complex64, torch.float16, torch.int16]
        x = x.to(rng.choice([choice for choice in choices if choice is not x.dtype]))
    elif kind == "device":
        x = x.to("meta")
    elif kind == "option":
        i = names.index(rng.choice(["dropout_p", "softcap"]))
        x = rng.choice([-1.0, 1.0001 if names[i] == "dropout_p" else INFINITY, math.nan, -INFINITY, "text", None])
    elif kind == "huge":
        x = x.reshape(-1)[:1].expand(2**40) if rng.random() < 0.5 else x.reshape(-1)[:1].expand(2**20, 2**20, 1, 1)
    else:
        x = x.reshape(-1)[:0]
    if kind == "rank" and names[i] == "attn_mask":
        x = x[:4]
    if kind in ("empty", "huge") and x.dim() == 1 and names[i] == "attn_mask":
        x = torch.zeros(7)
    arguments[i] = x
    what = f"{names[i]} {kind} {tuple(x.shape) if isinstance(x, torch.Tensor) else x}"
    return f"{op} {what}", lambda: op(*arguments)


def test_bad_input():
    assert_rejects("test_scaled_dot_product_attention", 500)

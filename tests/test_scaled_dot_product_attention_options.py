"""Windows, alignment, soft caps, ALiBi, sinks, packed sequences and log-sum-exps of scaled_dot_product_attention."""

import math

import pytest
import torch
import transforms
from adversary import Canary
from hypothesis import given, settings
from hypothesis import strategies as st
from policy import DTYPES, LOW_PRECISION, assert_bitwise, assert_relative, run, threads, truth_of
from torch.nn import functional as F

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

KERNEL = "scaled_dot_product_attention_fwd"


def distances(queries, keys, alignment):
    diagonal = keys - queries if alignment == "lower_right" else 0
    return torch.arange(keys) - torch.arange(queries)[:, None] - diagonal


def visible(queries, keys, window, alignment):
    left, right = window
    distance = distances(queries, keys, alignment)
    return (distance >= -(keys + queries if left < 0 else left)) & (
        distance <= (keys + queries if right < 0 else right)
    )


def reference(
    query,
    key,
    value,
    mask=None,
    sinks=None,
    slopes=None,
    *,
    window=(-1, -1),
    alignment="upper_left",
    causal=False,
    softcap=None,
):
    """(out, lse) by the formula, in the dtype of query. A bool mask has True for what takes part."""
    group = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(group, -3), value.repeat_interleave(group, -3)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = visible(query.shape[-2], key.shape[-2], (window[0], 0 if causal else window[1]), alignment)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    if slopes is not None:
        distance = distances(query.shape[-2], key.shape[-2], alignment).abs().to(scores.dtype)
        scores = scores - slopes[..., None, None].to(scores.dtype) * distance
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        column = sinks[..., None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    finite = scores.masked_fill(empty, 0)
    weights = finite.softmax(-1).masked_fill(empty, 0)[..., : key.shape[-2]]
    return weights @ value, finite.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)


def operands(batch, heads, key_heads, queries, keys, dim, value_dim, dtype):
    sizes = ((heads, queries, dim), (key_heads, keys, dim), (key_heads, keys, value_dim))
    return [torch.randn(batch, *size).to(dtype) for size in sizes]


OPTIONS = {
    "window": {"window": (9, 3)},
    "sliding": {"window": (30, -1), "is_causal": True},
    "lower right": {"is_causal": True, "alignment": "lower_right"},
    "alibi": {"alibi": True, "is_causal": True, "alignment": "lower_right"},
    "sinks": {"sinks": True},
    "soft cap": {"softcap": 0.75},
    "all": {"window": (40, 8), "alignment": "lower_right", "softcap": 1.5, "alibi": True, "sinks": True},
}
GRID = [  # batch, heads, key heads, queries, keys, dim, value dim
    (8, 4, 4, 40, 40, 16, 16),
    (4, 4, 2, 65, 127, 64, 64),
    (8, 2, 1, 100, 70, 32, 24),
    (4, 2, 2, 70, 1100, 40, 40),  # two blocks of keys
]


def formula_of(kind, heads, dtype):
    """(attention, the same by the formula, sinks): functions of query, key, value and sinks that give (out, lse)."""
    options = dict(OPTIONS[kind])
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(heads)]) if options.pop("alibi", False) else None
    sinks = None
    if options.pop("sinks", False):
        sinks = torch.randn(heads, dtype=torch.float64 if dtype is torch.float64 else torch.float32)

    def ours(q, k, v, s):
        return attention(q, k, v, enable_gqa=True, alibi_slopes=slopes, sinks=s, return_lse=True, **options)

    def formula(q, k, v, s):
        window, alignment = options.get("window", (-1, -1)), options.get("alignment", "upper_left")
        causal, softcap = options.get("is_causal", False), options.get("softcap")
        return reference(q, k, v, None, s, slopes, window=window, alignment=alignment, causal=causal, softcap=softcap)

    return ours, formula, sinks


def joined(fn):
    """(out, lse) of fn in one tensor, 0 for rows without a key."""

    def call(*inputs):
        out, lse = fn(*inputs)
        return torch.cat((out, lse.masked_fill(lse == -math.inf, 0)[..., None].to(out.dtype)), -1)

    return call


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, kind):
    """P1: output and gradients have no larger an error than the formula in torch's ops in the same dtype."""
    if backend.name in ("sim", "interpret") and shape[3] * shape[4] > 10000:
        shape = (1, *shape[1:])
    ours, formula, sinks = formula_of(kind, shape[1], dtype)
    query, key, value = operands(*shape, dtype)
    grad = torch.randn(*query.shape[:-1], value.shape[-1] + 1).to(dtype)
    output, grads = run(joined(ours), query, key, value, sinks, grad_output=grad)
    truth, truth_grads = truth_of(joined(formula), query, key, value, sinks, grad_output=grad)
    peer = run(joined(formula), query, key, value, sinks, grad_output=grad)
    assert_relative(output[..., :-1], truth[..., :-1], [peer[0][..., :-1]], what=f"{kind} output")
    for i, name in enumerate(("query", "key", "value")):
        assert_relative(grads[i], truth_grads[i], [peer[1][i]], kind="gradient", what=f"{kind} grad_{name}")
    relative = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(output[..., -1].double(), truth[..., -1], rtol=relative, atol=relative)
    if sinks is not None:
        torch.testing.assert_close(grads[3].double(), truth_grads[3], rtol=10 * relative, atol=10 * relative)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_decoding(backend, dtype, kind):
    """P1 for a few queries over many keys."""
    few = backend.name in ("sim", "interpret") and dtype is not torch.float32  # whose errors differ least from torch's
    shape = (2 if few else 16, 4, 2, 2, 1100, 40, 24)
    ours, formula, sinks = formula_of(kind, 4, dtype)
    query, key, value = operands(*shape, dtype)
    output, lse = ours(query, key, value, sinks)
    truth, truth_lse = formula(*(t.double() for t in (query, key, value)), sinks)
    assert_relative(output, truth, [formula(query, key, value, sinks)[0]], what=kind)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


SMALL = st.integers(1, 9)


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    group=st.integers(1, 2),
    key_heads=st.integers(1, 2),
    queries=st.integers(1, 30),
    keys=st.integers(1, 40),
    dim=SMALL,
    value_dim=SMALL,
    alignment=st.sampled_from(["upper_left", "lower_right"]),
    mask_kind=st.sampled_from([None, "bool", "float"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=2000)
def test_generated(data, dtype, batch, group, key_heads, queries, keys, dim, value_dim, alignment, mask_kind, seed):
    """Every combination of the options with every mask, in every shape: results and all gradients."""
    torch.manual_seed(seed)
    heads = group * key_heads
    query, key, value = operands(batch, heads, key_heads, queries, keys, dim, value_dim, dtype)
    window = (data.draw(st.integers(-1, 20)), data.draw(st.integers(-1, 20)))
    sinks = None
    if data.draw(st.booleans()):
        sinks = torch.randn(data.draw(st.sampled_from([1, heads])), dtype=torch.float64).to(
            torch.float64 if dtype is torch.float64 else torch.float32
        )
    slopes = torch.rand(batch, heads) if data.draw(st.booleans()) else None
    mask = None
    if mask_kind:
        mask = torch.rand([data.draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]) > 0.3
        if mask_kind == "float":
            mask = torch.randn(mask.shape).to(dtype).masked_fill(~mask, -math.inf)
    causal = mask is None and data.draw(st.booleans())
    options = {"window": window, "alignment": alignment, "softcap": data.draw(st.sampled_from([None, 0.7, 30.0]))}
    float_mask = mask if mask_kind == "float" else None
    grad = torch.randn(batch, heads, queries, value_dim + 1).to(dtype)

    def ours(q, k, v, m, s):
        m = mask if m is None else m
        own = {"is_causal": causal, "alibi_slopes": slopes, "sinks": s, "enable_gqa": True, "return_lse": True}
        return attention(q, k, v, m, **own, **options)

    def formula(q, k, v, m, s):
        return reference(q, k, v, mask if m is None else m, s, slopes, causal=causal, **options)

    output, grads = run(joined(ours), query, key, value, float_mask, sinks, grad_output=grad)
    truth, truth_grads = truth_of(joined(formula), query, key, value, float_mask, sinks, grad_output=grad)
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output.double(), truth, rtol=tolerance, atol=tolerance)
    for i, (got, expected) in enumerate(zip(grads, truth_grads, strict=True)):
        if got is not None:
            expected = expected.nan_to_num() if i == 3 else expected
            torch.testing.assert_close(got.double(), expected, rtol=4 * tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("keys", [40, 1100])
@pytest.mark.parametrize("shared", ["rows", "heads", "keys", "batch"])
def test_mask_gradient_is_the_same_for_any_number_of_threads(backend, shared, keys):
    """One thread sums it on the way, several in a pass of their own."""
    query, key, value = (torch.randn(3, 2, n, 8) for n in (70, keys, keys))
    sizes = {"rows": (3, 2, 1, keys), "heads": (3, 1, 70, keys), "keys": (3, 2, 70, 1), "batch": (2, 70, keys)}
    mask, grad = torch.randn(sizes[shared]), torch.randn(query.shape)
    grads = []
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):
        with threads(count):
            grads.append(run(attention, query, key, value, mask, grad_output=grad)[1][3])
    truth = truth_of(lambda *x: reference(*x)[0], query, key, value, mask, grad_output=grad)[1][3]
    torch.testing.assert_close(grads[0].double(), truth, rtol=1e-4, atol=1e-4)
    for other in grads[1:]:
        assert_bitwise(other, grads[0])


@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (70, 130)])
def test_alignment_is_that_of_torch(backend, queries, keys, alignment):
    from torch.nn.attention import bias

    query, key, value = operands(1, 2, 2, queries, keys, 8, 8, torch.float32)
    variant = bias.causal_lower_right if alignment == "lower_right" else bias.causal_upper_left
    expected = F.scaled_dot_product_attention(query, key, value, variant(queries, keys)._materialize(query.device))
    expected = expected.nan_to_num()  # torch: NaN for queries without a key
    torch.testing.assert_close(attention(query, key, value, is_causal=True, alignment=alignment), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(70, 1300), (3, 2100)], ids=str)
def test_bitwise(backend, dtype, shape):
    """P5: run to run and for any number of threads, when keys are split over them too."""
    query, key, value = operands(1, 2, 1, *shape, 16, 16, dtype)
    sinks, slopes = torch.randn(2), torch.tensor([0.5, 0.01])
    grad = torch.randn(query.shape).to(dtype)

    def fn(q, k, v, s):
        options = {"window": (200, -1), "is_causal": True, "alignment": "lower_right"}
        return attention(q, k, v, sinks=s, alibi_slopes=slopes, enable_gqa=True, **options)

    first = run(fn, query, key, value, sinks, grad_output=grad)
    for count in (1, 2, 3) if backend.name == "cpu" else (1,):  # of CPU threads
        with threads(count):
            again = run(fn, query, key, value, sinks, grad_output=grad)
        assert_bitwise(again[0], first[0], f"{count} threads")
        for a, b in zip(again[1], first[1], strict=True):
            assert_bitwise(a, b, f"{count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [20, 1100])
def test_what_lies_outside_is_not_seen(backend, dtype, keys):
    """P6: NaN and infinity outside of a window change no bit of what is inside, in any gradient."""
    query, key, value = operands(2, 2, 2, 9, keys, 8, 8, dtype)
    grad = torch.randn(query.shape).to(dtype)
    seen = visible(9, keys, (3, 2), "lower_right").any(0)

    def fn(q, k, v):
        return attention(q, k, v, window=(3, 2), alignment="lower_right")

    expected = run(fn, query, key, value, grad_output=grad)
    for poison in (math.nan, math.inf):
        k, v = key.clone(), value.clone()
        k[:, :, ~seen] = v[:, :, ~seen] = poison
        got = run(fn, query, k, v, grad_output=grad)
        assert_bitwise(got[0], expected[0])
        for a, b in zip(got[1], expected[1], strict=True):
            assert_bitwise(a, b, f"{poison}")
    one = value.clone()
    one[:, :, -9] = math.nan  # seen by queries 0 to 3 only
    got = fn(query, key, one)
    assert got[:, :, :4].isnan().all()
    assert_bitwise(got[:, :, 4:], expected[0][:, :, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_canaries(backend, dtype):
    """Nothing is read or written around the operands."""
    sizes = ((1, 2, 5, 9), (1, 2, 7, 9), (1, 2, 7, 3), (1, 2, 5, 3))
    guarded = [Canary(torch.randn(s).to(dtype)) for s in sizes] + [Canary(torch.randn(2)), Canary(torch.rand(2))]
    query, key, value, grad, sinks, slopes = (c.tensor for c in guarded)
    results = run(
        lambda q, k, v, s: attention(q, k, v, sinks=s, alibi_slopes=slopes, window=(1, 1)),
        query, key, value, sinks, grad_output=grad,
    )  # fmt: skip
    for c in guarded:
        c.assert_untouched()
    for t in (results[0], *results[1]):
        assert not t.isnan().any()


def test_merging_parts(backend):
    """Attention over parts of the keys, put together by the log-sum-exps, is attention over all; gradients too."""
    query, key, value = (t.double().requires_grad_() for t in operands(2, 2, 2, 5, 90, 8, 8, torch.float32))
    grad = torch.randn(2, 2, 5, 8, dtype=torch.float64)

    def merged(q, k, v):
        parts = [attention(q, a, b, return_lse=True) for a, b in zip(k.split(37, 2), v.split(37, 2), strict=True)]
        outs, lses = (torch.stack(t) for t in zip(*parts, strict=True))
        return (outs * lses.softmax(0)[..., None]).sum(0)

    got, expected = (run(fn, query, key, value, grad_output=grad) for fn in (merged, attention))
    torch.testing.assert_close(got[0], expected[0])
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_returned_weights_give_the_output(backend):
    query, key, value = (t.requires_grad_() for t in operands(2, 4, 2, 5, 9, 8, 8, torch.float64))
    for options in ({}, {"dropout_p": 0.4, "seed": 3}, {"softcap": 0.5, "window": (3, 1), "alignment": "lower_right"}):
        options |= {"sinks": torch.ones(4, dtype=torch.float64), "enable_gqa": True}
        out, lse, weights = attention(query, key, value, return_lse=True, return_weights=True, **options)
        assert weights.shape == (2, 4, 5, 9)
        assert lse.shape == (2, 4, 5)
        product = weights @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(product, out)
        got, expected = (torch.autograd.grad(t.square().sum(), (query, key), retain_graph=True) for t in (product, out))
        torch.testing.assert_close(got, expected)
    assert len(attention(query, key, value, enable_gqa=True, return_weights=True)) == 2


def test_sinks_are_a_key_without_a_value(backend):
    query, key, value = operands(1, 2, 2, 5, 7, 8, 8, torch.float64)
    with_key = attention(query, torch.cat((torch.zeros(1, 2, 1, 8), key), 2).double(), F.pad(value, (0, 0, 1, 0)))
    torch.testing.assert_close(attention(query, key, value, sinks=torch.zeros(2)), with_key)
    out, lse = attention(query, key, value, torch.zeros(5, 7, dtype=torch.bool), sinks=torch.ones(2), return_lse=True)
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.ones_like(lse))
    large = attention(query.float(), key.float(), value.float(), sinks=torch.tensor([200.0, -200.0]))
    assert (large[:, 0] == 0).all()
    torch.testing.assert_close(large[:, 1], attention(query, key, value)[:, 1].float())


@pytest.mark.parametrize("kind", ["window", "soft cap", "alibi", "sinks", "lse", "all"])
def test_gradcheck(backend, kind):
    shapes = [(1, 4, 3, 3), (1, 2, 4, 3), (1, 2, 4, 2), (4, 1, 4), (4,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    slopes = torch.rand(4) if kind in ("alibi", "all") else None
    options = {"window": (1, 1), "alignment": "lower_right"} if kind in ("window", "all") else {}
    if kind in ("soft cap", "all"):
        options["softcap"] = 0.8

    def fn(query, key, value, mask, sinks):
        mask = mask if kind in ("soft cap", "all") else None
        use = {"sinks": sinks if kind in ("sinks", "all") else None, "attn_mask": mask}
        lse = {"return_lse": kind in ("lse", "all"), "enable_gqa": True, "alibi_slopes": slopes}
        return attention(query, key, value, **use, **lse, **options)

    fast = backend.name != "cpu"
    assert torch.autograd.gradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)
    assert torch.autograd.gradgradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)


def test_transforms(backend):
    query, key, value = operands(2, 2, 2, 5, 7, 8, 8, torch.float32)

    def fn(q, k, v, s):
        out, lse = attention(q, k, v, sinks=s, window=(2, 1), alignment="lower_right", return_lse=True)
        return out * lse[..., None]

    transforms.assert_all(fn, query, key, value, torch.randn(2, 2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": (1,)}, ValueError, "two integers from -1 on, got \\(1,\\)"),
        ({"window": (1, -2)}, ValueError, "two integers from -1 on"),
        ({"window": (1.0, 2)}, ValueError, "two integers from -1 on"),
        ({"alignment": "left"}, ValueError, 'expected alignment to be "upper_left" or "lower_right", got \'left\''),
        ({"softcap": 0.0}, ValueError, "expected softcap to be above 0 and finite, got 0.0"),
        ({"softcap": math.nan}, ValueError, "above 0 and finite, got nan"),
        ({"alibi_slopes": torch.ones(3)}, RuntimeError, "alibi_slopes that broadcast to the heads \\(1, 2\\)"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"sinks": torch.ones(3)}, RuntimeError, "sinks that broadcast to the heads \\(1, 2\\) of query, got \\(3,\\)"),
        ({"sinks": torch.ones(2), "key": (1, 2, 0, 8), "value": (1, 2, 0, 8)}, RuntimeError, "at least one key"),
        ({"sinks": torch.ones(2, device="meta")}, RuntimeError, "same device"),
    ],
    ids=str,
)
def test_errors(backend, change, error, message):
    arguments = {"query": (1, 2, 4, 8), "key": (1, 2, 5, 8), "value": (1, 2, 5, 8), **change}
    shaped = ("query", "key", "value")
    arguments = {k: torch.randn(v) if k in shaped else v for k, v in arguments.items()}
    with pytest.raises(error, match=message):
        attention(**arguments)


def packed_case(lengths, key_lengths, heads=2, key_heads=1, dim=8, dtype=torch.float32, tail=0):
    """(query, key, value, cu_seqlens of query, cu_seqlens of key) of sequences of these lengths, (H, T, D)."""
    starts = [torch.tensor([0, *n]).cumsum(0) for n in (lengths, key_lengths)]
    queries, keys = (int(s[-1]) + tail for s in starts)
    query, key, value = (t[0] for t in operands(1, heads, key_heads, queries, keys, dim, dim, dtype))
    return query, key, value, *starts


def one_by_one(query, key, value, starts, key_starts, **options):
    """Attention of each sequence on its own."""
    ends = zip(starts, starts[1:], key_starts, key_starts[1:], strict=False)
    outs = [attention(query[:, a:b], key[:, c:d], value[:, c:d], enable_gqa=True, **options) for a, b, c, d in ends]
    return torch.cat(outs, 1)


LENGTHS = {
    "equal": ([5, 5, 5], [5, 5, 5]),
    "one is empty": ([7, 0, 3, 40], [4, 6, 0, 70]),
    "long": ([90, 33, 150], [90, 33, 150]),
    "one": ([12], [9]),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": (9, 2), "alignment": "lower_right"},
        {"is_causal": True, "alignment": "lower_right", "alibi_slopes": torch.tensor([0.5, 0.125])},
        {"window": (3, -1), "softcap": 0.9, "sinks": torch.tensor([0.5, -1.0])},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(backend, dtype, lengths, options):
    """cu_seqlens: results and gradients are those of each sequence on its own, NaN of others included."""
    query, key, value, starts, key_starts = packed_case(*LENGTHS[lengths], dtype=dtype)
    if "sinks" in options and 0 in LENGTHS[lengths][1]:
        pytest.skip("a sequence without keys has no sink on its own")
    grad = torch.randn(query.shape).to(dtype)

    def packed(q, k, v):
        cu_seqlens = starts.int() if lengths == "equal" else (starts, key_starts)
        return attention(q, k, v, cu_seqlens=cu_seqlens, enable_gqa=True, **options)

    got = run(packed, query, key, value, grad_output=grad)
    expected = run(lambda *x: one_by_one(*x, starts, key_starts, **options), query, key, value, grad_output=grad)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * tolerance, atol=4 * tolerance)
    key[:, : key_starts[1]] = math.nan  # the first sequence
    poisoned = run(packed, query, key, value, grad_output=grad)
    assert_bitwise(poisoned[0][:, starts[1] :], got[0][:, starts[1] :])
    assert_bitwise(poisoned[1][2][:, key_starts[1] :], got[1][2][:, key_starts[1] :])


def test_queries_behind_the_last_sequence_see_nothing(backend):
    query, key, value, starts, _ = packed_case([5, 9], [5, 9], tail=3)
    ones = torch.ones_like(query)
    out, grads = run(lambda *x: attention(*x, cu_seqlens=starts, enable_gqa=True), query, key, value, grad_output=ones)
    assert (out[:, 14:] == 0).all()
    assert (out[:, :14] != 0).all()
    assert all((g[:, 14:] == 0).all() for g in grads)


def test_packed_sequences_transform(backend):
    query, key, value, starts, key_starts = packed_case([5, 3], [4, 6], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (query, key, value)]

    def fn(q, k, v):
        options = {"window": (2, 1), "alignment": "lower_right", "return_lse": True}
        out, lse = attention(q, k, v, cu_seqlens=(starts, key_starts), enable_gqa=True, **options)
        return out * lse[..., None]

    fast = backend.name != "cpu"
    assert torch.autograd.gradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)
    assert torch.autograd.gradgradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert_bitwise(compiled(*inputs), fn(*inputs))
    batched = [torch.stack((t, t + 1)).detach() for t in inputs]
    expected = torch.stack([fn(*(t[i] for t in batched)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(fn)(*batched), expected)


def test_nested_tensors(backend):
    """A jagged batch gives what each of its members gives, in a jagged batch again; gradients too."""
    lengths = [3, 17, 8]
    rows = [[torch.randn(n, 2, 8, requires_grad=True) for n in lengths] for _ in range(3)]
    nested = [torch.nested.as_nested_tensor(t, layout=torch.jagged).transpose(1, 2) for t in rows]
    out = attention(*nested, is_causal=True)
    expected = [attention(*(t[i].transpose(0, 1) for t in rows), is_causal=True) for i in range(3)]
    assert out.is_nested
    assert out.shape[0] == 3
    for got, want in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(got, want)
    leaves = [leaf for t in rows for leaf in t]
    grads = torch.autograd.grad(out.transpose(1, 2).values().square().sum(), leaves)
    wanted = torch.autograd.grad(sum(t.square().sum() for t in expected), leaves)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="expected nested tensors without attn_mask"):
        attention(*nested, torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"expected key .* in torch's jagged layout"):
        attention(nested[0], rows[1][0], nested[2])


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 4], TypeError, "expected cu_seqlens to be a tensor or a pair of them, got \\[0, 4\\]"),
        (torch.tensor([0.0, 4.0]), RuntimeError, "int32 or int64, got torch.float32"),
        (torch.tensor([[0, 4]]), RuntimeError, "\\(N \\+ 1\\)"),
        (torch.tensor([1, 4]), RuntimeError, "rise from 0 to at most the length of query, 4"),
        (torch.tensor([0, 3, 2]), RuntimeError, "rise from 0"),
        (torch.tensor([0, 5]), RuntimeError, "at most the length of query, 4"),
        ((torch.tensor([0, 4]), torch.tensor([0, 2, 5])), RuntimeError, "as many sequences in query as in key, got 1"),
        (torch.tensor([0, 4], device="meta"), RuntimeError, "expected cu_seqlens on cpu as query, got meta"),
    ],
    ids=str,
)
def test_bad_starts(backend, cu_seqlens, error, message):
    query, key, value = operands(1, 2, 2, 4, 5, 8, 8, torch.float32)
    with pytest.raises(error, match=message):
        attention(query, key, value, cu_seqlens=cu_seqlens)


def test_bad_ranges_read_nothing_outside(backend):
    """The op itself with ranges that are none: any result, but from the operands alone."""
    guarded = [Canary(torch.randn(1, 2, n, 8)) for n in (70, 90, 90)]
    tensors = [c.tensor for c in guarded]
    for low, high in ((-1000, 1000), (80, 10), (2**31 - 1, -(2**31))):
        key_ranges = torch.tensor([[low, high, 5, 0]] * 70, dtype=torch.int32)
        query_ranges = torch.tensor([[low, high]] * 90, dtype=torch.int32)
        args = (*tensors, None, None, None, None, key_ranges, query_ranges)
        options = (0.0, -1, -1, False, 0.3, 0.0)
        out, lse = backend.ops.scaled_dot_product_attention_fwd(*args, *options)
        backend.ops.scaled_dot_product_attention_bwd(out, None, *args, out, lse, *options, False, False)
        for c in guarded:
            c.assert_untouched()


@pytest.mark.parametrize("scale", [0.0, -0.2, 0.05, 0.2], ids=str)
@pytest.mark.parametrize("keys", [37, 600, 1100])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_scale_of_16_bits(cpu_kernels, dtype, keys, scale):
    """Only scores with a positive factor are weighed without being scaled first."""
    query, grad = (torch.randn(2, 70, 32).to(dtype) for _ in range(2))
    key, value = (torch.randn(2, keys, 32).to(dtype) for _ in range(2))

    def scaled(q, k, v):
        return reference(q * (scale * math.sqrt(32)), k, v)[0]

    output, grads = run(lambda *x: attention(*x, scale=scale), query, key, value, grad_output=grad)
    expected, truth = truth_of(scaled, query, key, value, grad_output=grad)
    assert_relative(output, expected)
    for got, of, name in zip(grads, truth, ("query", "key", "value"), strict=True):
        assert_relative(got, of, kind="gradient", what=name)


def test_denormal_results_of_16_bits(cpu_kernels):
    """What is too small for a normal number is rounded like the rest, not taken for 0."""
    query, key = (torch.randn(1, 2, 9, 32).bfloat16() for _ in range(2))
    value = torch.full((1, 2, 9, 32), 2.0**-130).bfloat16()
    assert_bitwise(attention(query, key, value), value)

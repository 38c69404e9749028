"""The weights of attention as a result of their own, of each head and averaged, against the formula in float64."""

import math

import pytest
import torch
import transforms
from adversary import Canary, layouts
from bad_input import assert_rejects
from policy import DTYPES, FLOAT64_ERROR, FLOOR, MARGIN, assert_bitwise, assert_relative, relative_error, threads
from test_scaled_dot_product_attention_options import distances, visible

import pynn
from pynn.ops._attention_functions import lse_dtype
from pynn.ops._attention_weights import AttentionWeights
from pynn.ops._function import call
from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

KERNEL = "attention_weights"
ops = torch.ops.pynn
INFINITY = math.inf


def formula(
    query,
    key,
    mask=None,
    *,
    window=(-1, -1),
    alignment="upper_left",
    slopes=None,
    sinks=None,
    softcap=0.0,
    keep=None,
    p=0,
):
    """(..., H, Lq, Lk) weights in the dtype of query; 0 for rows without a key."""
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    queries, keys = query.shape[-2], key.shape[-2]
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    hidden = ~visible(queries, keys, window, alignment)
    if mask is not None:
        hidden = hidden | (~mask if mask.dtype is torch.bool else mask == -INFINITY)
        scores = scores if mask.dtype is torch.bool else scores + mask.masked_fill(mask == -INFINITY, 0)
    if slopes is not None:
        scores = scores - slopes[:, None, None].to(scores.dtype) * distances(queries, keys, alignment).abs()
    scores = scores.masked_fill(hidden, -INFINITY)
    if sinks is not None:
        column = sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), -1)
    weights = scores.softmax(-1)[..., :keys].masked_fill(hidden, 0).nan_to_num(0)
    return weights if keep is None else weights * keep / (1 - p)


def weights_of(
    query, key, mask=None, average=False, *, dropout_p=0.0, seed=None, slopes=None, sinks=None, softcap=0.0, **options
):
    """The op on the log-sum-exps of the same backend's attention."""
    left, right = options.pop("window", (-1, -1))
    lower_right = options.pop("alignment", "upper_left") == "lower_right"
    compute = torch.float64 if query.dtype is torch.float64 else torch.float32
    per_head = [None if t is None else t.to(compute).expand(query.shape[:-2]) for t in (slopes, sinks)]
    random = None if seed is None else torch.tensor([seed, 0])
    inputs = (mask, random, *per_head, None, None)
    values = (dropout_p, left, right, lower_right, 1 / math.sqrt(query.shape[-1]), softcap)
    assert not options
    with torch.no_grad():
        lse = pynn.backends.op("scaled_dot_product_attention_fwd", query)(query, key, key, *inputs, *values)[1]
    return call(AttentionWeights, query, key, *inputs, lse, *values, average)


OPTIONS = {
    "none": {},
    "causal": {"window": (-1, 0)},
    "window": {"window": (30, 4), "alignment": "lower_right"},
    "alibi": {"slopes": True, "window": (-1, 0), "alignment": "lower_right"},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
}
GRID = [  # batch, heads, key heads, queries, keys, dim
    (4, 4, 4, 40, 40, 16),
    (2, 4, 2, 65, 127, 64),
    (1, 2, 1, 70, 300, 72),
    (1, 4, 4, 300, 40, 24),  # more rows than a task of the CPU kernels takes
    (8, 2, 2, 40, 1100, 16),  # two blocks of keys; alibi leaves few numbers that matter
    (1, 2, 2, 5, 33, 136),
]


@pytest.mark.parametrize("kind", [*OPTIONS, "bool", "padding", "float"])
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, kind):
    """P1 for the weights of each head and for their mean, against softmax and mean of torch in the same dtype."""
    batch, heads, key_heads, queries, keys, dim = shape
    if backend.name == "sim" and queries * keys > 5000:
        batch, heads, key_heads = min(batch, 4), heads // key_heads, 1
    query, key = torch.randn(batch, heads, queries, dim).to(dtype), torch.randn(batch, key_heads, keys, dim).to(dtype)
    options = dict(OPTIONS.get(kind, {}))
    if options.get("slopes"):
        options["slopes"] = torch.tensor([2.0 ** -(i + 1) for i in range(heads)])
    if options.get("sinks"):
        options["sinks"] = torch.randn(heads, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    mask = {
        "bool": torch.rand(batch, 1, queries, keys) > 0.3,
        "padding": (torch.arange(keys) < torch.randint(1, keys + 1, (batch,))[:, None])[:, None, None],
        "float": torch.randn(heads, queries, keys).to(dtype),
    }.get(kind)
    mask64 = mask.double() if kind == "float" else mask
    truth = formula(query.double(), key.double(), mask64, **options)
    peer = formula(query, key, mask, **options)
    assert_relative(weights_of(query, key, mask, **options), truth, [peer], what=kind)
    mean = weights_of(query, key, mask, average=True, **options)
    assert mean.shape == (batch, queries, keys)
    assert_relative(mean, truth.mean(1), [peer.mean(1)], what=f"{kind}, averaged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(backend, dtype):
    """The weights are those that attention used: kept ones are scaled, the others are 0."""
    p, seed = 0.3, 12
    query, key = torch.randn(2, 3, 37, 16).to(dtype), torch.randn(2, 3, 70, 16).to(dtype)
    keep = ops.scaled_dot_product_attention_keep(query, key, torch.tensor([seed, 0]), p)
    truth = formula(query.double(), key.double(), keep=keep, p=p)
    got = weights_of(query, key, dropout_p=p, seed=seed)
    assert torch.equal(got == 0, ~keep)
    for result, expected in ((got, truth), (weights_of(query, key, None, True, dropout_p=p, seed=seed), truth.mean(1))):
        assert relative_error(result, expected) <= max(MARGIN["forward"] * FLOOR[dtype], 2e-7)
    assert (weights_of(query, key, dropout_p=1.0, seed=seed) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise(backend, dtype):
    """P5: for every number of threads, slice of the batch and layout of the operands."""
    query, key, mask = torch.randn(2, 3, 70, 8).to(dtype), torch.randn(2, 3, 90, 8).to(dtype), torch.randn(3, 70, 90)
    for average in (False, True):
        expected = weights_of(query, key, mask, average, window=(60, 7))
        for count in (1, 2, 3) if backend.name == "cpu" else (1,):
            with threads(count):
                assert_bitwise(weights_of(query, key, mask, average, window=(60, 7)), expected, f"{count} threads")
        part = weights_of(query[1:], key[1:], mask, average, window=(60, 7))
        assert_bitwise(part, expected[1:], "slice")
        for (name, q), (_, k), (_, m) in zip(layouts(query), layouts(key), layouts(mask), strict=False):
            assert_bitwise(weights_of(q, k, m, average, window=(60, 7)), expected, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [9, 1100])
def test_masked_is_masked(backend, dtype, keys):
    """P6: what a masked key holds has no influence, its weight is 0, and so are all of a row without a key."""
    query, key = torch.randn(2, 2, 7, 8).to(dtype), torch.randn(2, 2, keys, 8).to(dtype)
    mask = torch.rand(2, 1, 7, keys) > 0.3
    mask[..., 3] = False
    mask[1, 0, 2] = False
    expected, mean = (weights_of(query, key, mask, average) for average in (False, True))
    assert (expected[1, :, 2] == 0).all()
    assert (expected.masked_select(~mask) == 0).all()
    for poison in (math.nan, INFINITY, -INFINITY):
        poisoned = key.clone()
        poisoned[..., 3, :] = poison
        assert_bitwise(weights_of(query, poisoned, mask), expected, f"{poison}")
        assert_bitwise(weights_of(query, poisoned, mask, average=True), mean, f"{poison}, averaged")
    query[0, 0, 4] = math.nan
    got = weights_of(query, key, mask)
    assert got[0, 0, 4].masked_select(mask[0, 0, 4]).isnan().all()
    assert (got.masked_select(~mask) == 0).all(), "a masked weight of a query that is NaN"


def test_uniform_weights(backend):
    """P4: without differences between keys every weight is the rounded quotient; on a GPU, that of an exponential."""
    for dtype in DTYPES:
        query, key = torch.zeros(2, 4, 9, 16, dtype=dtype), torch.randn(2, 4, 70, 16).to(dtype)
        expected = torch.full((2, 9, 70), 1 / 70, dtype=torch.float64).to(dtype)
        got = weights_of(query, key, average=True)
        if backend.name == "cpu" or dtype.itemsize == 2:
            assert_bitwise(got, expected, str(dtype))
        else:
            bound = FLOAT64_ERROR if dtype is torch.float64 else torch.finfo(dtype).eps
            assert ((got - expected).abs() <= bound * expected).all()


def test_canaries(backend):
    guarded = [Canary(torch.randn(s)) for s in ((1, 2, 5, 9), (1, 2, 7, 9), (5, 7))]
    query, key, mask = (c.tensor for c in guarded)
    assert weights_of(query, key, mask, average=True).isfinite().all()
    for c in guarded:
        c.assert_untouched()


def test_packed_sequences(backend):
    """Queries of one sequence give no weight to keys of another."""
    query, key, value = (torch.randn(2, 30, 8) for _ in range(3))
    starts = torch.tensor([0, 11, 30])
    out, weights = attention(query, key, value, cu_seqlens=starts, return_weights=True)
    torch.testing.assert_close(weights @ value, out)
    assert (weights[:, :11, 11:] == 0).all()
    assert (weights[:, 11:, :11] == 0).all()


def test_gradcheck(backend):
    shapes = [(1, 4, 3, 3), (1, 2, 4, 3), (4, 1, 4), (4,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    fast = backend.name != "cpu"
    for average in (False, True):

        def fn(query, key, mask, sinks, average=average):
            return weights_of(query, key, mask, average, sinks=sinks, dropout_p=0.2, seed=4, window=(2, 1), softcap=1.3)

        assert torch.autograd.gradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, inputs, nondet_tol=0.0, fast_mode=fast)


def test_transforms(backend):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)

    def fn(q, k):
        return attention(q, k, k, enable_gqa=True, return_weights=True, window=(3, 1))[1]

    transforms.assert_all(fn, query, key)


def arguments(dtype=torch.float32):
    query, key = torch.randn(2, 4, 3, 8).to(dtype), torch.randn(2, 2, 5, 8).to(dtype)
    lse = torch.randn(2, 4, 3, dtype=lse_dtype(dtype))
    ranges = torch.tensor([[0, 5, 0, 0]] * 3).int(), torch.tensor([[0, 3]] * 5).int()
    numbers = torch.rand(2, 4)
    return [query, key, torch.randn(3, 5), torch.tensor([1, 2]), numbers, numbers, *ranges, lse]


OPTION_VALUES = [0.5, 3, -1, True, 0.3, 2.0]


def test_opcheck(backend):
    for average in (False, True):
        torch.library.opcheck(ops.attention_weights.default, (*arguments(), *OPTION_VALUES, average))


def test_empty(backend):
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, key = torch.randn(batch, 2, queries, 8), torch.randn(batch, 2, keys, 8)
        assert weights_of(query, key).shape == (batch, 2, queries, keys)
        assert weights_of(query, key, average=True).shape == (batch, queries, keys)


def bad_call(rng):
    """A call of the op with one operand spoiled."""
    operands = arguments()
    i = rng.randrange(len(operands))
    x = operands[i]
    kind = rng.choice(["rank", "size", "dtype", "device", "huge"])
    if kind == "rank":
        x = x[(None,) * rng.randint(4, 6)]
    elif kind == "size":
        d = rng.randrange(x.dim())
        x = torch.cat([x] * rng.randint(2, 3), d)
        if (i, d) == (1, 1):  # as many heads as the query may have
            x = x.to(torch.int8)
    elif kind == "dtype":
        x = x.to(torch.complex64)
    elif kind == "device":
        x = x.to("meta")
    else:
        x = x.reshape(-1)[:1].expand(2**40)
    operands[i] = x
    return f"operand {i} {kind} {tuple(x.shape)}", lambda: ops.attention_weights(*operands, *OPTION_VALUES, True)


def test_bad_input():
    assert_rejects("test_attention_weights", 300)
    with pytest.raises(RuntimeError, match="query with heads to average over"):
        ops.attention_weights(
            torch.randn(3, 8),
            torch.randn(5, 8),
            *(None,) * 6,
            torch.randn(3).double(),
            0.0,
            -1,
            -1,
            False,
            1.0,
            0.0,
            True,
        )

"""multi_head_attention against projections and attention in float64, and against the same parts of torch."""

import math

import pytest
import torch
import transforms
from adversary import constant, layouts
from policy import FLOAT64_ERROR, assert_bitwise, relative_error, run, threads, truth_of
from test_scaled_dot_product_attention_options import reference
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pynn
from pynn.ops import multi_head_attention, rotary_embedding

KERNEL = "multi_head_attention_bwd"
ops = torch.ops.pynn
# Times the error of torch: a bias has few numbers, whose sums of float32 differ in their order.
CHANCE = {torch.float64: 1.5, torch.float32: 1.5, torch.bfloat16: 1.02, torch.float16: 1.02}
TOKENS = ("self", "shared", "separate")  # which of query, key and value are the same tensor


def parameters(heads, key_heads, width, dim, dtype, bias=True, out=None):
    """in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias of sizes that keep numbers near 1."""
    rows, out = (heads + 2 * key_heads) * dim, width if out is None else out
    weights = [torch.randn(rows, width) / math.sqrt(width), torch.randn(out, heads * dim) / math.sqrt(heads * dim)]
    biases = [torch.randn(rows), torch.randn(out)] if bias else [None, None]
    return [None if t is None else t.to(dtype) for t in (weights[0], biases[0], weights[1], biases[1])]


def tokens_of(kind, batch, queries, keys, width, dtype):
    query = torch.randn(batch, queries, width).to(dtype)
    if kind == "self":
        return (query,)
    key = torch.randn(batch, keys, width).to(dtype)
    return (query, key) if kind == "shared" else (query, key, torch.randn(batch, keys, width).to(dtype))


def three(tokens):
    return (*tokens, *[tokens[-1]] * (3 - len(tokens)))


def by_parts(tokens, parameters, heads, key_heads, attend):
    """F.linear, `attend` on heads (N, H, L, D), F.linear."""
    weight, bias, out_weight, out_bias = parameters
    dim = out_weight.shape[1] // heads
    sizes = [heads * dim, key_heads * dim, key_heads * dim]
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    projected = (F.linear(t, w, b) for t, w, b in zip(three(tokens), weight.split(sizes), biases, strict=True))
    out = attend(*(t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in projected))
    return F.linear(out.transpose(1, 2).flatten(2), out_weight, out_bias)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("shape", [(4, 4, 4, 40, 40, 64, 16), (2, 4, 2, 33, 70, 64, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(backend, dtype, shape, kind):
    """Errors of the output and of every gradient are those of the same computation in torch's kernels.

    Attention's own errors are compared in its tests. Here most come from the products, which are torch's in both, and
    whose rounding the two meet with other numbers.
    """
    batch, heads, key_heads, queries, keys, width, dim = shape
    tokens = tokens_of(kind, batch, queries, keys, width, dtype)
    weights = parameters(heads, key_heads, width, dim, dtype)
    grad = torch.randn(batch, queries, width).to(dtype)
    split = len(tokens)

    def ours(*inputs):
        return multi_head_attention(*three(inputs[:split]), *inputs[split:], heads, num_kv_heads=key_heads)[0]

    def formula(*inputs):
        return by_parts(inputs[:split], inputs[split:], heads, key_heads, lambda q, k, v: reference(q, k, v)[0])

    def peer(*inputs):
        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        with sdpa_kernel(SDPBackend.MATH):
            return by_parts(inputs[:split], inputs[split:], heads, key_heads, attend)

    output, grads = run(ours, *tokens, *weights, grad_output=grad)
    truth, truth_grads = truth_of(formula, *tokens, *weights, grad_output=grad)
    peer_output, peer_grads = run(peer, *tokens, *weights, grad_output=grad)
    names = ("output", *(f"gradient {i}" for i in range(len(grads))))
    for name, got, expected, theirs in zip(
        names, (output, *grads), (truth, *truth_grads), (peer_output, *peer_grads), strict=True
    ):
        error, limit = relative_error(got, expected), CHANCE[dtype] * relative_error(theirs, expected)
        assert error <= max(limit, FLOAT64_ERROR), f"{name}: relative error {error:.3e} > {limit:.3e}"


def options_of(name, batch, heads, length):
    return {
        "causal": {"is_causal": True},
        "window": {"window": (4, 1), "alignment": "lower_right"},
        "masks": {
            "attn_mask": torch.randn(heads, length, length).double(),
            "key_mask": torch.rand(batch, length) > 0.3,
        },
        "bool": {"attn_mask": torch.rand(length, length) > 0.3, "key_mask": torch.rand(batch, length) > 0.3},
        "dropout": {"dropout_p": 0.3, "seed": 5},
        "alibi, sinks": {"alibi_slopes": torch.rand(heads), "sinks": torch.randn(heads).double()},
        "softcap, scale": {"softcap": 2.0, "scale": 0.4},
        "rotary": {"rotary": tuple(f(torch.rand(length, 4) * 9) for f in (torch.cos, torch.sin))},
        "interleaved": {
            "rotary": tuple(f(torch.rand(batch, length, 3) * 9) for f in (torch.cos, torch.sin)),
            "rotary_interleaved": True,
        },
    }[name]


OPTIONS = ("causal", "window", "masks", "bool", "dropout", "alibi, sinks", "softcap, scale", "rotary", "interleaved")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", TOKENS)
def test_options(backend, kind, name):
    """Every option gives what projections around scaled_dot_product_attention give, weights and gradients included."""
    batch, heads, key_heads, length, width, dim = 2, 4, 2, 9, 12, 8
    tokens = tokens_of(kind, batch, length, length, width, torch.float64)
    weights = parameters(heads, key_heads, width, dim, torch.float64, bias=name != "causal")
    options = options_of(name, batch, heads, length)
    grad, weights_grad = torch.randn(batch, length, width).double(), torch.randn(batch, heads, length, length).double()
    masks = [t.requires_grad_() for n, t in options.items() if n in ("attn_mask", "sinks") and t.is_floating_point()]
    leaves = [t.requires_grad_() for t in (*tokens, *weights) if t is not None] + masks

    def attend(q, k, v):
        chosen = dict(options)
        tables, interleaved = chosen.pop("rotary", None), chosen.pop("rotary_interleaved", False)
        if tables is not None:
            q, k = (rotary_embedding(t, *tables, interleaved=interleaved) for t in (q, k))
        key_mask, mask = chosen.pop("key_mask", None), chosen.pop("attn_mask", None)
        if key_mask is not None:
            key_mask = key_mask[:, None, None]
            mask = mask & key_mask if mask.dtype is torch.bool else mask.masked_fill(~key_mask, -math.inf)
        out, found = pynn.ops.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa=True, return_weights=True, **chosen
        )
        attend.weights = found
        return out

    def ours(**more):
        return multi_head_attention(*three(tokens), *weights, heads, num_kv_heads=key_heads, **options, **more)

    expected = by_parts(tokens, weights, heads, key_heads, attend)
    expected_grads = torch.autograd.grad((expected * grad).sum(), leaves, retain_graph=True)
    output, none = ours()
    assert none is None
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(torch.autograd.grad(output, leaves, grad), expected_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)

    expected_weights = attend.weights
    for average in (True, False):
        output, got_weights = ours(need_weights=True, average_attn_weights=average)
        wanted_weights = expected_weights.mean(1) if average else expected_weights
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got_weights, wanted_weights, rtol=1e-10, atol=1e-12)
        got = torch.autograd.grad(output, leaves, grad, retain_graph=True)  # weights that nobody differentiates
        for a, b in zip(got, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        both = weights_grad.mean(1) if average else weights_grad
        got, wanted = (
            torch.autograd.grad((o * grad).sum() + (w * both).sum(), leaves, retain_graph=True)
            for o, w in ((output, got_weights), (expected, wanted_weights))
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", TOKENS)
def test_sequence_first_and_unbatched(backend, kind):
    heads, batch, width = 2, 3, 8
    tokens = tokens_of(kind, batch, 5, 5 if kind == "self" else 7, width, torch.float64)
    weights = parameters(heads, heads, width, 4, torch.float64)
    grad = torch.randn(batch, 5, width).double()

    def gradients(fn, inputs, grad_output):
        leaves = [t.detach().requires_grad_() for t in (*inputs, *weights)]
        output, found = fn(leaves[: len(inputs)], leaves[len(inputs) :])
        return output, found, torch.autograd.grad(output, leaves, grad_output)

    def call(**more):
        return lambda t, w: multi_head_attention(*three(t), *w, heads, need_weights=True, **more)

    expected = gradients(call(), tokens, grad)
    turned = gradients(call(batch_first=False), [t.transpose(0, 1).contiguous() for t in tokens], grad.transpose(0, 1))
    torch.testing.assert_close(turned[0].transpose(0, 1), expected[0])
    torch.testing.assert_close(turned[1], expected[1])
    for i, (a, b) in enumerate(zip(turned[2], expected[2], strict=True)):
        torch.testing.assert_close(a.transpose(0, 1) if i < len(tokens) else a, b)
    single = gradients(call(), [t[0] for t in tokens], grad[0])
    torch.testing.assert_close(single[0], expected[0][0])
    torch.testing.assert_close(single[1], expected[1][0])
    torch.testing.assert_close(single[2][0], expected[2][0][0])


def test_bitwise(backend):
    """P5: run to run, on any number of threads, for every layout of the tokens and of the gradient."""
    heads, width = 4, 32
    x, weights = torch.randn(2, 20, width), parameters(4, 4, width, 8, torch.float32)
    grad = torch.randn(2, 20, width)

    def fn(x, *weights):
        return multi_head_attention(x, x, x, *weights, heads)[0]

    expected = run(fn, x, *weights, grad_output=grad)
    for count in (1, 2) if backend.name == "cpu" else (1,):
        with threads(count):
            again = run(fn, x, *weights, grad_output=grad)
        assert_bitwise(again[0], expected[0], f"{count} threads")
        for a, b in zip(again[1], expected[1], strict=True):
            assert_bitwise(a, b, f"{count} threads")
    for (name, tokens), (_, changed) in zip(layouts(x), layouts(grad), strict=True):
        output, grads = run(fn, tokens, *weights, grad_output=changed)
        torch.testing.assert_close(output, expected[0], msg=lambda m, name=name: f"{name}: {m}")
        for a, b in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    ones = constant(grad.shape, 1.0, torch.float32)
    for a, b in zip(
        run(fn, x, *weights, grad_output=ones)[1], run(fn, x, *weights, grad_output=ones.contiguous())[1], strict=True
    ):
        torch.testing.assert_close(a, b)


def test_fully_masked_and_empty(backend):
    """P6: a query without a key gives the output's bias and no gradient; no tokens give none."""
    weights = [t.requires_grad_() for t in parameters(2, 2, 8, 4, torch.float32)]
    x = torch.randn(2, 3, 8, requires_grad=True)
    keep = torch.tensor([[False] * 3, [True, False, True]])
    output, found = multi_head_attention(x, x, x, *weights, 2, key_mask=keep, need_weights=True)
    assert torch.equal(output[0], weights[3].expand(3, 8))
    assert (found[0] == 0).all()
    output.square().sum().backward()
    assert (x.grad[0] == 0).all()
    assert all(t.grad.isfinite().all() for t in weights)
    for batch, queries, keys in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, key = torch.randn(batch, queries, 8, requires_grad=True), torch.randn(batch, keys, 8)
        output, found = multi_head_attention(query, key, key, *weights, 2, need_weights=True)
        assert output.shape == query.shape
        assert found.shape == (batch, queries, keys)
        assert torch.autograd.grad(output.sum(), query)[0].shape == query.shape


def test_no_copies(backend):
    """The gradients of one projection come as one tensor, whose rows are those of the tokens."""
    query, key = torch.randn(2, 5, 8, 4).transpose(1, 2), torch.randn(2, 5, 2, 4).transpose(1, 2)
    options = (0.0, -1, -1, False, 0.5, 0.0)
    rest = (None,) * 6
    out, lse = backend.ops.scaled_dot_product_attention_fwd(query, key, key, *rest, *options)
    arguments = (torch.randn(out.shape), None, query, key, key, *rest, out, lse, *options, False, False)
    expected = backend.ops.scaled_dot_product_attention_bwd(*arguments)[:3]
    packed, own, *_ = backend.ops.multi_head_attention_bwd(*arguments, True, False)
    assert packed.shape == (2, 5, 12, 4)
    assert own.numel() == 0
    assert_bitwise(packed.transpose(1, 2), torch.cat(expected, 1))
    packed, own, *_ = backend.ops.multi_head_attention_bwd(*arguments, False, True)
    assert packed.shape == (5, 2, 4, 4)
    assert_bitwise(packed.permute(1, 2, 0, 3), torch.cat(expected[1:], 1))
    assert_bitwise(own.permute(1, 2, 0, 3), expected[0])
    assert packed.is_contiguous()


def test_saves_no_scores(backend):
    """What is kept for the backward grows with the number of keys, not with that of scores."""
    kept = []

    def pack(t):
        kept.append(t)
        return t

    x, weights = torch.randn(1, 300, 16, requires_grad=True), parameters(2, 2, 16, 8, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        multi_head_attention(x, x, x, *weights, 2, need_weights=True)
    assert max(t.numel() for t in kept) <= 300 * 48


def test_gradcheck(backend):
    weights = parameters(2, 1, 3, 2, torch.float64)
    query, key, mask = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 3), (2, 4, 3), (2, 1, 4)))
    tables = tuple(f(torch.rand(3, 1) * 5) for f in (torch.cos, torch.sin))
    fast = backend.name != "cpu"

    def crossed(query, key, mask, *weights):
        return multi_head_attention(query, key, key, *weights, 2, num_kv_heads=1, attn_mask=mask, need_weights=True)

    def itself(x, *weights):
        return multi_head_attention(x, x, x, *weights, 2, num_kv_heads=1, rotary=tables, dropout_p=0.2, seed=3)[0]

    for fn, inputs in ((crossed, (query, key, mask, *weights)), (itself, (query, *weights))):
        leaves = [t.detach().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(fn, leaves, nondet_tol=0.0, fast_mode=fast)
        assert torch.autograd.gradgradcheck(fn, leaves, nondet_tol=0.0, fast_mode=True)


def test_one_input_made_from_another(backend):
    """A second derivative where key is a function of query: its gradient must not be counted twice."""
    weights = parameters(2, 2, 4, 2, torch.float64)
    query = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def fn(query):
        key = query.sin()
        return multi_head_attention(query, key, key, *weights, 2)[0]

    assert torch.autograd.gradgradcheck(fn, (query,), fast_mode=backend.name != "cpu")


@pytest.mark.parametrize("kind", ["self", "shared, rotary", "weights"])
def test_transforms(backend, kind):
    weights = parameters(2, 2, 8, 4, torch.float32)
    tables = tuple(f(torch.rand(5, 2) * 5) for f in (torch.cos, torch.sin))

    def fn(x, y, in_weight):
        own = (in_weight, *weights[1:])
        if kind == "self":
            return multi_head_attention(x, x, x, *own, 2, is_causal=True)[0] + y
        output, found = multi_head_attention(
            x, y, y, *own, 2, need_weights=kind == "weights", rotary=None if kind == "weights" else tables
        )
        return output if found is None else output + found.sum(-1, keepdim=True)

    transforms.assert_all(fn, torch.randn(2, 5, 8), torch.randn(2, 5, 8), weights[0])


def test_autocast(backend):
    weights = [t.requires_grad_() for t in parameters(2, 2, 8, 4, torch.float32)]
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        output = multi_head_attention(x, x, x, *weights, 2)[0]
    assert output.dtype is torch.bfloat16
    expected = multi_head_attention(*[x.bfloat16()] * 3, *(t.bfloat16() for t in weights), 2)[0]
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert x.grad.dtype is torch.float32
    assert all(t.grad.dtype is torch.float32 for t in weights)


def test_opcheck(backend):
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    options = (0.5, 2, -1, True, 0.4, 0.0)
    inputs = (torch.randn(4, 1, 5), torch.tensor([1, 0]), None, torch.randn(2, 4), None, None)
    out, lse = ops.scaled_dot_product_attention_fwd(query, key, key, *inputs, *options)
    arguments = (out, None, query, key, key, *inputs, out, lse, *options, True, True)
    for with_query, sequence_first in ((True, False), (False, True)):
        torch.library.opcheck(ops.multi_head_attention_bwd.default, (*arguments, with_query, sequence_first))


GOOD = {"query": (2, 4, 8), "key": (2, 5, 8), "value": (2, 5, 8), "in_proj_weight": (24, 8), "in_proj_bias": (24,)}
GOOD |= {"out_proj_weight": (8, 8), "out_proj_bias": (8,), "num_heads": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": (4, 8)}, RuntimeError, "expected query, key and value \\(N, L, E\\) or all of them"),
        ({"query": (1, 2, 4, 8)}, RuntimeError, "expected query, key and value"),
        ({"value": (2, 6, 8)}, RuntimeError, "as many values as keys, got \\(2, 6, 8\\)"),
        ({"key": (3, 5, 8), "value": (3, 5, 8)}, RuntimeError, "leading dimensions of query"),
        ({"query": (2, 4, 9)}, RuntimeError, "same last dimension, got 9, 8, 8"),
        ({"num_heads": 3}, RuntimeError, "out_proj_weight \\(E, 3 D\\), got \\(8, 8\\)"),
        ({"num_kv_heads": 3}, RuntimeError, "num_kv_heads that divide num_heads, got 3 and 2"),
        ({"num_kv_heads": 1}, RuntimeError, "in_proj_weight of 16 rows"),
        ({"in_proj_bias": (8,)}, RuntimeError, "in_proj_bias \\(24\\), got \\(8,\\)"),
        ({"out_proj_bias": (7,)}, RuntimeError, "out_proj_bias \\(8\\), got \\(7,\\)"),
        ({"key_mask": torch.ones(2, 4).bool()}, RuntimeError, "key_mask \\(2, 5\\), got \\(2, 4\\)"),
        ({"attn_mask": torch.zeros(4, 6)}, RuntimeError, "attn_mask"),
        ({"attn_mask": torch.zeros(4, 5), "is_causal": True}, RuntimeError, "Explicit attn_mask should not be set"),
        ({"window": (1,)}, ValueError, "two integers from -1 on"),
        ({"alignment": "left"}, ValueError, "alignment"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"dropout_p": 1.5}, RuntimeError, "dropout probability has to be between 0 and 1, but got 1.5"),
        ({"sinks": torch.zeros(3)}, RuntimeError, "sinks that broadcast to the heads \\(2, 2\\)"),
        ({"alibi_slopes": torch.zeros(2, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"rotary": (torch.ones(4, 2), torch.ones(4, 2))}, RuntimeError, "as many keys as queries with rotary"),
        ({"key": torch.zeros(2, 5, 8, device="meta")}, RuntimeError, "same device"),
    ],
    ids=str,
)
def test_errors(backend, change, error, message):
    arguments = {**GOOD, **change}
    arguments = {
        k: torch.randn(v) if isinstance(v, tuple) and k not in ("window", "rotary") else v for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        multi_head_attention(**arguments)

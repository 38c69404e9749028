"""additive_attention against its formula in float64, torch's formula in every dtype, and what breaks kernels."""

import math
import random

import pytest
import torch
import transforms
from adversary import Canary, constant, layouts
from bad_input import assert_rejects
from generated import generated
from hypothesis import strategies as st
from policy import (
    DTYPES,
    FLOAT64_ERROR,
    FLOOR,
    MARGIN,
    assert_bitwise,
    assert_nonfinite,
    relative_error,
    run,
    threads,
    truth_of,
)

import pynn
from pynn import backends
from pynn.ops import additive_attention

ops = torch.ops.pynn
NAMES = ("out", "query", "key", "value", "weight", "mask")


def operands(lead=(2,), queries=5, keys=7, dim=6, value_dim=4, dtype=torch.float64):
    """[query, key, value, weight]"""
    shapes = ((*lead, queries, dim), (*lead, keys, dim), (*lead, keys, value_dim), (dim,))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def formula(query, key, value, weight, mask=None, with_weights=False):
    """In torch's operations; rows without any key are 0."""
    scores = (query[..., :, None, :] + key[..., None, :, :]).tanh() @ weight
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return (weights @ value, weights) if with_weights else weights @ value


def random_mask(kind, lead, queries, keys, dtype):
    """A mask that leaves every query one key at least."""
    if kind == "none":
        return None
    if kind == "bool":
        mask = torch.rand(*lead, queries, keys) < 0.6
        return mask | (torch.arange(keys) == torch.randint(keys, (*lead, queries, 1)))
    mask = torch.randn(*lead[1:], queries if kind == "float" else 1, keys)
    return mask.to(dtype)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "row"])
@pytest.mark.parametrize("shape", [(1, 37, 29, 64, 32), (3, 20, 45, 21, 37), (2, 9, 70, 130, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype, shape, mask):
    """P1 against the same formula in torch operations, over several problems together: one of them is chance."""
    heads, queries, keys, dim, value_dim = shape
    problems, batch = (1, 1) if backend.name == "interpret" else (3, 2)
    results: dict[str, list] = {}
    for _ in range(problems):
        tensors = operands((batch, heads), queries, keys, dim, value_dim, dtype)
        attn_mask = random_mask(mask, (batch, heads), queries, keys, dtype)
        grad = torch.randn(batch, heads, queries, value_dim).to(dtype)
        if mask == "bool":
            calls = [lambda *t, m=attn_mask: additive_attention(*t, m), lambda *t, m=attn_mask: formula(*t, m)]
        else:
            calls, tensors = [additive_attention, formula], [*tensors, attn_mask]
        columns = (
            run(calls[0], *tensors, grad_output=grad),
            truth_of(calls[1], *tensors, grad_output=grad),
            run(calls[1], *tensors, grad_output=grad),
        )
        for name, *triple in zip(NAMES, *((output, *grads) for output, grads in columns), strict=False):
            if triple[0] is not None:
                results.setdefault(name, []).append([t.reshape(-1) for t in triple])
    assert len(results) == (6 if mask in ("float", "row") else 5)
    for name, triples in results.items():
        ours, exact, theirs = (torch.cat(tensors) for tensors in zip(*triples, strict=True))
        error, peer = relative_error(ours, exact), relative_error(theirs, exact)
        margin = MARGIN["forward" if name == "out" else "gradient"]
        limit = FLOAT64_ERROR if dtype is torch.float64 else max(peer, margin * FLOOR[dtype])
        assert error <= limit, f"{name}: error {error:.3e}, torch {peer:.3e}"


def test_weights(backend):
    tensors = operands((3,), 9, 40, 20, 6)
    mask = random_mask("bool", (3,), 9, 40, None)
    seeds = torch.randn(3, 9, 6).double(), torch.randn(3, 9, 40).double()

    def total(fn):
        def scalar(*t):
            results = fn(*t)
            return sum((r * seed).sum() for r, seed in zip(results, seeds, strict=True))

        return scalar

    def ours(*t):
        return additive_attention(*t, mask, return_weights=True)

    def exact(*t):
        return formula(*t, mask, with_weights=True)

    for got, expected in zip(ours(*tensors), exact(*tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    one = torch.ones(()).double()
    _, grads = run(total(ours), *tensors, grad_output=one)
    _, truth = truth_of(total(exact), *tensors, grad_output=one)
    for got, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    # The weights alone, and their sums: nothing else has a gradient.
    _, grads = run(lambda *t: ours(*t)[1], *tensors, grad_output=seeds[1])
    _, truth = truth_of(lambda *t: exact(*t)[1], *tensors, grad_output=seeds[1])
    assert not grads[2].any()
    for got, expected in zip(grads[:2] + grads[3:], truth[:2] + truth[3:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_out(backend, dtype):
    tensors = operands((2,), 6, 50, 17, 50, dtype)
    tensors[2] = torch.eye(50, dtype=dtype).expand(2, 50, 50)
    out, weights = additive_attention(*tensors, return_weights=True)
    torch.testing.assert_close(out, weights)
    assert_bitwise(additive_attention(*tensors), out)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_keys_have_no_influence(backend, kind):
    """P6: NaN and infinity in what a mask hides, for all queries or for some of them."""
    tensors = operands((2,), 10, 40, 33, 20, torch.float32)
    seen = torch.rand(2, 10, 40) < 0.5
    seen[:, :, 5], seen[:, 4], seen[:, 0, 7] = False, False, True
    hidden_rows = ~seen.any(-1)
    mask = seen if kind == "bool" else torch.randn(2, 10, 40).masked_fill(~seen, -math.inf)
    grad = torch.randn(2, 10, 20)

    def call(q, k, v, w):
        return additive_attention(q, k, v, w, mask)

    clean = run(call, *tensors, grad_output=grad)
    query, key, value, weight = (t.clone() for t in tensors)
    key[:, 5], value[:, 5] = math.nan, math.inf
    query[:, 4] = math.nan
    dirty = run(call, query, key, value, weight, grad_output=grad)
    assert_bitwise(dirty[0], clean[0])
    for name, a, b in zip(NAMES[1:], dirty[1], clean[1], strict=False):
        assert_bitwise(a, b, name)
    assert hidden_rows.any()
    assert not clean[0][hidden_rows].any()
    assert not clean[1][0][hidden_rows].any()
    assert not clean[1][1][:, 5].any()
    # One key that some queries see: those and no others become NaN.
    value[:, 7] = math.nan
    out = call(query, key, value, weight)
    assert_nonfinite(out, torch.where(seen[:, :, 7, None], math.nan, clean[0]))


def test_nonfinite(backend):
    """NaN and infinity that nothing hides are torch's."""
    query, key, value, weight = operands((1,), 4, 6, 5, 3, torch.float32)
    query[0, 1, 2], key[0, 3, 0], value[0, 2, 1] = math.inf, -math.inf, math.inf
    out = additive_attention(query, key, value, weight)
    assert_nonfinite(out, formula(query, key, value, weight))
    torch.testing.assert_close(out, formula(query, key, value, weight), equal_nan=True)
    key[0, 3, 0] = math.nan
    assert additive_attention(query, key, value, weight).isnan().all()


def test_mask_gradient_of_hidden_keys(backend):
    """A float mask with -inf: 0 there, and a row that is hidden as a whole has no gradient at all."""
    tensors = [t.requires_grad_() for t in operands((1,), 3, 4)]
    mask = torch.zeros(1, 3, 4).double()
    mask[0, 0, 1], mask[0, 2] = -math.inf, -math.inf
    mask.requires_grad_()
    out = additive_attention(*tensors, mask)
    grads = torch.autograd.grad(out.square().sum(), [*tensors, mask])
    assert all(g.isfinite().all() for g in grads)
    assert grads[-1][0, 0, 1] == 0
    assert not grads[-1][0, 2].any()
    assert grads[-1][0, 1].all()
    assert not grads[0][0, 2].any()


def test_bitwise(backend):
    """P5: the same bits again, with threads, in slices of the batch, and for inputs in other strides."""
    queries, keys = {"cpu": (130, 40), "interpret": (5, 9)}.get(backend.name, (20, 40))
    tensors = operands((3, 2), queries, keys, 33, 20, torch.float32)
    mask = torch.randn(3, 1, 1, keys)
    grad = torch.randn(3, 2, queries, 20)

    def call(*t, m=mask):
        return additive_attention(*t, m)

    out, grads = run(call, *tensors, grad_output=grad)
    for count in (1, 2):
        with threads(count):
            again, grads_again = run(call, *tensors, grad_output=grad)
        assert_bitwise(again, out)
        for a, b in zip(grads_again, grads, strict=True):
            assert_bitwise(a, b)
    part = [t[1:2] for t in tensors[:3]]
    alone, grads_alone = run(lambda *t: call(*t, m=mask[1:2]), *part, tensors[3], grad_output=grad[1:2])
    assert_bitwise(alone, out[1:2])
    for a, b in zip(grads_alone[:3], grads[:3], strict=True):
        assert_bitwise(a, b[1:2])


def test_strides(backend):
    tensors = [*operands((2, 3), 5, 7, 9, 6, torch.float32), torch.randn(2, 3, 5, 7)]
    expected, grads = run(additive_attention, *tensors, grad_output=torch.ones(2, 3, 5, 6))
    for i, tensor in enumerate(tensors):
        for name, view in layouts(tensor):
            ones = constant((2, 3, 5, 6), 1.0, torch.float32)
            got, got_grads = run(additive_attention, *tensors[:i], view, *tensors[i + 1 :], grad_output=ones)
            assert_bitwise(got, expected, f"{NAMES[1:][i]}, {name}")
            for a, b in zip(got_grads, grads, strict=True):
                assert_bitwise(a, b, f"gradients, {NAMES[1:][i]}, {name}")


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (5, 1), (3, 1, 7), (2, 1, 1, 7), (2, 1, 5, 1), (1, 3, 5, 7)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_broadcasts(backend, shape, kind):
    tensors = operands((2, 3))
    mask = torch.rand(shape) < 0.5 if kind == "bool" else torch.randn(shape).double().requires_grad_()
    out = additive_attention(*tensors, mask)
    expected = formula(*tensors, mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    if kind == "float":
        got, truth = (torch.autograd.grad(t.square().sum(), mask)[0] for t in (out, expected))
        assert got.shape == mask.shape
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-13)


def test_float32_mask_beside_16_bits(backend):
    tensors = operands((2,), dtype=torch.bfloat16)
    mask = torch.randn(2, 5, 7).requires_grad_()
    out = additive_attention(*tensors, mask)
    assert out.dtype is torch.bfloat16
    (grad,) = torch.autograd.grad(out.float().square().sum(), mask)
    assert grad.dtype is torch.float32
    wide = mask.detach().double().requires_grad_()
    exact = formula(*(t.double() for t in tensors), wide)
    (truth,) = torch.autograd.grad(exact.square().sum(), wide)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grad.double(), truth, rtol=3e-2, atol=1e-2)


def test_leading_dimensions_broadcast(backend):
    query, _, _, weight = operands((4, 1, 3))
    _, key, value, _ = operands((2, 1))
    leaves = [t.requires_grad_() for t in (query, key, value, weight)]
    out = additive_attention(*leaves)
    expected = formula(*leaves)
    assert out.shape == (4, 2, 3, 5, 4)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    seed = torch.randn_like(out)
    got, truth = (torch.autograd.grad(t, leaves, seed) for t in (out, expected))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("lead", "queries", "keys", "dim", "value_dim"),
    [
        ((0,), 3, 4, 5, 2),
        ((2,), 0, 4, 5, 2),
        ((2,), 3, 0, 5, 2),
        ((2,), 3, 4, 0, 2),
        ((2,), 3, 4, 5, 0),
        ((), 1, 1, 1, 1),
    ],
)
def test_small_sizes(backend, lead, queries, keys, dim, value_dim):
    tensors = [t.requires_grad_() for t in operands(lead, queries, keys, dim, value_dim)]
    out, weights = additive_attention(*tensors, return_weights=True)
    assert out.shape == (*lead, queries, value_dim)
    assert weights.shape == (*lead, queries, keys)
    if keys == 0:
        assert not out.any()
    else:
        expected = formula(*tensors)
        torch.testing.assert_close(out, expected)
        got, truth = (torch.autograd.grad(t.sum(), tensors, allow_unused=True) for t in (out, expected))
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_many_keys(backend):
    """More tangents than a thread keeps; many tiles and runs of keys."""
    if backend.name != "cpu":
        pytest.skip("one tile after the other is tested with fewer keys")
    tensors = operands((1,), 3, 2100, 1024, 200, torch.float32)
    tensors[3] *= 0.05  # so that no key has all the weight
    grad = torch.randn(1, 3, 200)
    got, truth = run(additive_attention, *tensors, grad_output=grad), truth_of(formula, *tensors, grad_output=grad)
    peer = run(formula, *tensors, grad_output=grad)
    for name, a, b, c in zip(NAMES, (got[0], *got[1]), (truth[0], *truth[1]), (peer[0], *peer[1]), strict=False):
        assert relative_error(a, b) <= relative_error(c, b), name


def test_inputs_are_not_written(backend):
    canaries = [Canary(t) for t in operands(dtype=torch.float32)]
    run(additive_attention, *(c.tensor for c in canaries), grad_output=torch.randn(2, 5, 4))
    for canary in canaries:
        canary.assert_untouched()


def test_autocast(backend):
    tensors = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = additive_attention(*tensors)
    assert_bitwise(out, additive_attention(*(t.bfloat16() for t in tensors)))


def test_gradcheck(backend):
    tensors = [t.requires_grad_() for t in operands((2,), 3, 4, 3, 2)]
    mask = torch.randn(3, 4).double()
    mask[1, 2] = -math.inf
    seen = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    fast = backend.name != "cpu"
    torch.autograd.gradcheck(lambda *t: additive_attention(*t, seen), tensors, fast_mode=fast)
    free = torch.randn(1, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda *t: additive_attention(*t, return_weights=True), [*tensors, free], fast_mode=fast)
    if backend.name == "cpu":
        torch.autograd.gradgradcheck(lambda *t: additive_attention(*t, mask), tensors)
        torch.autograd.gradgradcheck(lambda *t: additive_attention(*t, seen, return_weights=True), tensors)
        torch.autograd.gradgradcheck(additive_attention, [*tensors, free])


def test_transforms(backend):
    tensors = operands((), 3, 4, 3, 2)
    transforms.assert_all(additive_attention, *tensors)
    mask = torch.tensor([True, False, True, True])
    transforms.assert_compiles(lambda *t: additive_attention(*t, mask, return_weights=True)[1], *tensors)
    transforms.assert_compiles(additive_attention, *tensors, torch.randn(3, 4).double())


def test_opcheck(backend):
    query, key, value, weight = operands((2,), 3, 4, 3, 2)
    for mask in (None, torch.randn(3, 4).double()):
        arguments = (query, key, value, weight, mask)
        torch.library.opcheck(backend.ops.additive_attention_fwd.default, (*arguments, mask is not None))
        out, lse, weights = backend.ops.additive_attention_fwd(*arguments, True)
        backward = (torch.randn_like(out), None if mask is None else torch.randn_like(weights), *arguments, lse)
        torch.library.opcheck(backend.ops.additive_attention_bwd.default, (*backward, mask is not None))


@generated(
    st.integers(0, 3), st.integers(1, 20), st.integers(1, 70), st.integers(1, 70), st.integers(1, 40),
    st.sampled_from(("none", "bool", "float", "row")), st.integers(0, 10**6),
)  # fmt: skip
def test_generated(backend, heads, queries, keys, dim, value_dim, mask, seed):
    torch.manual_seed(seed)
    tensors = operands((heads,), queries, keys, dim, value_dim)
    attn_mask = random_mask(mask, (heads, heads), queries, keys, torch.float64)
    if mask == "bool":
        attn_mask = attn_mask[0] if heads else None
    call = [lambda *t: additive_attention(*t, attn_mask), lambda *t: formula(*t, attn_mask)]
    grad = torch.randn(heads, queries, value_dim).double()
    got, truth = run(call[0], *tensors, grad_output=grad), truth_of(call[1], *tensors, grad_output=grad)
    torch.testing.assert_close(got[0], truth[0], rtol=1e-10, atol=1e-12)
    for a, b in zip(got[1], truth[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(2, 7, 5)}, r"expected key of shape \[2, 7, 6\]"),
        ({"value": torch.zeros(2, 6, 4)}, r"expected value of shape \[2, 7, 4\]"),
        ({"weight": torch.zeros(5)}, r"expected weight of shape \[6\], got \[5\]"),
        ({"weight": torch.zeros(1, 6)}, r"expected weight of shape \[6\], got \[1, 6\]"),
        ({"weight": torch.zeros(6).double()}, "weight and query to have the same dtype"),
        ({"key": torch.zeros(2, 7, 6).half()}, "key and query to have the same dtype"),
        ({"query": torch.zeros(2, 5, 6, dtype=torch.int64)}, "expected query to be float64"),
        ({"query": torch.zeros(6)}, "expected query with 2 to 9 dimensions, got 1"),
        ({"attn_mask": torch.zeros(2, 5, 6)}, "attn_mask that broadcasts"),
        ({"attn_mask": torch.zeros(1, 2, 5, 7)}, "attn_mask that broadcasts"),
        ({"attn_mask": torch.zeros(5, 7).half()}, "attn_mask dtype"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, "attn_mask dtype"),
        ({"key": torch.zeros(2, 7, 6, device="meta")}, "same device"),
    ],
)
def test_messages(change, message):
    query, key, value, weight = operands(dtype=torch.float32)
    arguments = {"query": query, "key": key, "value": value, "weight": weight} | change
    with pytest.raises(RuntimeError, match=message):
        additive_attention(**arguments)


def test_forced_backend_without_a_kernel_raises():
    with pynn.backend("library"), pytest.raises(RuntimeError, match="has no kernel for this op yet"):
        additive_attention(*operands())


def bad_call(rng: random.Random):
    """(description, call) of the op itself with one operand spoiled."""
    torch.manual_seed(rng.randrange(10**6))
    query, key, value, weight = operands((2,), rng.randint(2, 4), rng.randint(2, 4), rng.randint(2, 4), 5)
    queries, keys = query.shape[1], key.shape[1]
    mask = rng.choice((torch.rand(queries, keys) < 0.5, torch.randn(2, 1, keys).double()))
    arguments = [query, key, value, weight, mask]
    names = ["query", "key", "value", "weight", "attn_mask", "grad_out", "grad_weights", "lse", "mask_gradient"]
    backward = rng.random() < 0.5
    if backward:
        rows = (2, queries)
        arguments += [torch.randn(*rows, 5).double(), torch.randn(*rows, keys).double(), torch.randn(rows).double()]
    i = rng.randrange(len(arguments))
    ways = [
        lambda t: torch.cat((t, t), -1)[..., : 2 * t.shape[-1] - 1],
        lambda t: t[..., :-1] if t.shape[-1] > 2 else torch.cat((t, t), -1),
        lambda t: t.half(),
        lambda t: t.long(),
        lambda t: t.to("meta"),
        lambda t: t[None, None],
        lambda t: torch.cat((t, t, t)),
    ]
    way = rng.randrange(0 if backward or i != 2 else 2, len(ways))  # values of any width are right in forward
    arguments[i] = ways[way](arguments[i])
    if not backward:
        return f"fwd {names[i]} {way}", lambda: ops.additive_attention_fwd(*arguments, rng.random() < 0.5)
    *inputs, grad_out, grad_weights, lse = arguments
    wanted = arguments[4].dtype.is_floating_point
    call = ops.additive_attention_bwd
    return f"bwd {names[i]} {way}", lambda: call(grad_out, grad_weights, *inputs, lse, wanted)


def test_bad_calls():
    assert_rejects("test_additive_attention", 500)


def test_gradient_of_a_mask_that_is_not_floating():
    query, key, value, weight = operands()
    out, lse, _ = ops.additive_attention_fwd(query, key, value, weight, None, False)
    for mask in (None, torch.ones(5, 7, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="expected a floating attn_mask"):
            ops.additive_attention_bwd(out, None, query, key, value, weight, mask, lse, True)


@pytest.mark.parametrize("gradient_of", ["query", "mask", "weight"])
def test_vmap_is_one_call(backend, gradient_of, monkeypatch):
    """Samples are more leading dimensions where they share the weight and no gradient of it is wanted."""
    calls = []
    op = backends.op
    monkeypatch.setattr(backends, "op", lambda name, t: calls.append(name) or op(name, t))
    query, key, value = (torch.randn(5, 2, n, 3).double() for n in (4, 6, 6))
    weight, mask = torch.randn(3).double(), torch.randn(5, 4, 6).double()
    mask[:, 1, 2:] = -math.inf

    def loss(tensor, query, mask, weight):
        inputs = {"query": query, "mask": mask, "weight": weight} | {gradient_of: tensor}
        out, weights = additive_attention(
            inputs["query"], key[0], value[0], inputs["weight"], inputs["mask"], return_weights=True
        )
        return out.square().sum() + weights.square().sum()

    tensors = {"query": query, "mask": mask, "weight": weight}
    gradient, shared = torch.func.grad(loss), None if gradient_of == "weight" else 0
    got = torch.vmap(gradient, (shared, 0, 0, None))(tensors[gradient_of], query, mask, weight)
    count = len(calls)
    assert count == (2 if gradient_of != "weight" else 6)  # the gradient of weight is a sum for each sample
    for i in range(5):
        tensor = tensors[gradient_of] if shared is None else tensors[gradient_of][i]
        torch.testing.assert_close(got[i], gradient(tensor, query[i], mask[i], weight))

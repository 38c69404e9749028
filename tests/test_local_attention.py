"""local_attention against Luong's formula in float64."""

import math

import pytest
import torch
import transforms
from policy import DTYPES, FLOAT64_ERROR, FLOOR, assert_bitwise, relative_error, run, truth_of

from pynn.ops import local_attention, scaled_dot_product_attention

KERNEL = "scaled_dot_product_attention_fwd"
NAMES = ("out", "query", "key", "value", "center")


def operands(dtype=torch.float64, lead=(2, 3), queries=9, keys=20, dim=8, value_dim=5):
    """[query, key, value, center], the last within the keys, no key at the edge of a window"""
    tensors = [torch.randn(*lead, *s).to(dtype) for s in ((queries, dim), (keys, dim), (keys, value_dim))]
    return [*tensors, (torch.randint(1, keys - 1, (*lead, queries)) + 0.25).to(dtype)]


def formula(query, key, value, center, mask=None, *, width=3, sigma=None, scale=None):
    """The paper's: the softmax first, then the Gaussian; 0 where a window holds no key."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    sigma = width / 2 if sigma is None else sigma
    distance = torch.arange(key.shape[-2]) - center[..., None]
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(distance.abs() > width, -math.inf)
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return (weights * (-distance.square() / (2 * sigma**2)).exp()) @ value


def ours(query, key, value, center, mask=None, *, width=3, **options):
    return local_attention(query, key, value, center, mask, width=width, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype):
    """Against torch's formula, over several problems together: one of them is chance."""
    results: dict[str, list] = {}
    for _ in range(4):
        tensors = operands(dtype, (2, 4), 40, 50, 32, 24)
        grad = torch.randn(2, 4, 40, 24).to(dtype)
        columns = [run(lambda *t, f=fn: f(*t, width=6), *tensors, grad_output=grad) for fn in (ours, formula)]
        columns.insert(1, truth_of(lambda *t: formula(*t, width=6), *tensors, grad_output=grad))
        for name, *triple in zip(NAMES, *((output, *grads) for output, grads in columns), strict=True):
            results.setdefault(name, []).append([t.reshape(-1) for t in triple])
    for name, triples in results.items():
        got, exact, theirs = (torch.cat(tensors) for tensors in zip(*triples, strict=True))
        error, peer = relative_error(got, exact), relative_error(theirs, exact)
        limit = FLOAT64_ERROR if dtype is torch.float64 else max(peer, 1.25 * FLOOR[dtype])
        assert error <= limit, f"{name}: error {error:.3e}, torch {peer:.3e}"


@pytest.mark.parametrize(
    "options", [{}, {"width": 1}, {"width": 2.5, "sigma": 0.7}, {"width": 30}, {"scale": 0.2}], ids=str
)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "row"])
def test_formula(backend, options, kind):
    assert_matches_formula(operands(), kind, options)


@pytest.mark.parametrize("options", [{}, {"width": 2.5, "sigma": 0.7}, {"width": 9.25}], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "float", "row"])
def test_one_query_over_many_keys(backend, options, kind):
    """It attends over a copy of its window, which may lie beside the keys or reach beyond them."""
    query, key, value, center = operands(torch.float64, (2, 3), 1, 70, 8, 5)
    center = (torch.tensor([-30.0, -1.0, 0.5, 33.0, 68.75, 300.0]).double().view(2, 3, 1)).requires_grad_()
    assert_matches_formula((query, key, value, center), kind, options)


def assert_matches_formula(tensors, kind, options):
    queries, keys = tensors[0].shape[-2], tensors[1].shape[-2]
    hidden = torch.rand(2, 1, queries, keys) < 0.3
    mask = {
        "none": None,
        "bool": torch.rand(2, 3, queries, keys) < 0.6,
        "float": torch.randn(2, 1, queries, keys).double().masked_fill(hidden, -math.inf),
        "row": torch.randn(keys).double(),
    }[kind]
    grad = torch.randn(2, 3, queries, 5).double()
    inputs = [*tensors] if kind in ("none", "bool") else [*tensors, mask]

    def call(fn):
        return lambda *t: fn(*t[:4], t[4] if len(t) == 5 else mask, **options)

    got, truth = (run(call(fn), *inputs, grad_output=grad) for fn in (ours, formula))
    torch.testing.assert_close(got[0], truth[0], rtol=1e-11, atol=1e-13)
    for a, b in zip(got[1], truth[1], strict=True):
        torch.testing.assert_close(a, b.nan_to_num(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(9,), (1,), (3, 9), (3, 1), (2, 1, 9)], ids=str)
def test_centers_broadcast(backend, shape):
    query, key, value, _ = operands()
    center = (torch.rand(shape) * 19).double().requires_grad_()
    out, expected = ours(query, key, value, center), formula(query, key, value, center)
    torch.testing.assert_close(out, expected)
    got, truth = (torch.autograd.grad(t.square().sum(), center)[0] for t in (out, expected))
    torch.testing.assert_close(got, truth)
    whole = center.detach().round().long()
    torch.testing.assert_close(ours(query, key, value, whole), formula(query, key, value, whole))


def test_monotonic_alignment_is_a_window(backend):
    query, key, value, _ = operands(queries=20)
    out = ours(query, key, value, torch.arange(20), width=4, sigma=math.inf)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value, window=(4, 4)))


def test_width_0_is_the_key_at_the_center(backend):
    query, key, value, _ = operands()
    center = torch.randint(20, (2, 3, 9))
    out = ours(query, key, value, center, width=0)
    torch.testing.assert_close(out, value.gather(2, center[..., None].expand(2, 3, 9, 5)))
    assert not ours(query, key, value, center + 0.5, width=0).any()


def test_windows_without_keys(backend):
    tensors = operands()
    tensors[3][0, 0, 1], tensors[3][1, 2] = -50, 1000
    leaves = [t.requires_grad_() for t in tensors]
    out = ours(*leaves)
    assert not out[0, 0, 1].any()
    assert not out[1, 2].any()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, 0, 1].any()
    assert not grads[3][1, 2].any()


def test_keys_outside_of_all_windows_have_no_influence(backend):
    tensors = operands(torch.float32)
    tensors[3].clamp_(4, 9)
    grad = torch.randn(2, 3, 9, 5)
    clean = run(ours, *tensors, grad_output=grad)
    query, key, value, center = (t.clone() for t in tensors)
    key[..., 14:, :], value[..., 0, :] = math.nan, math.inf
    dirty = run(ours, query, key, value, center, grad_output=grad)
    assert_bitwise(dirty[0], clean[0])
    for name, a, b in zip(NAMES[1:], dirty[1], clean[1], strict=True):
        assert_bitwise(a, b, name)


def test_grouped_queries(backend):
    query, key, value, center = operands(lead=(2, 4))
    key, value = key[:, :2], value[:, :2]
    out = ours(query, key, value, center, enable_gqa=True)
    wide = (t.repeat_interleave(2, 1) for t in (key, value))
    torch.testing.assert_close(out, formula(query, *wide, center))


def test_dropout(backend):
    """What is dropped is 0, what is kept is 1 / (1 - p) times itself: the mean over seeds is near the whole."""
    query, key, _, center = operands(lead=(1, 1), queries=40)
    eye = torch.eye(20).double().expand(1, 1, 20, 20)
    weights = ours(query, key, eye, center)
    kept = ours(query, key, eye, center, dropout_p=0.5, seed=3)
    torch.testing.assert_close(kept, torch.where(kept != 0, 2 * weights, 0))
    inside = weights != 0
    assert 0.3 < float((kept[inside] != 0).double().mean()) < 0.7
    torch.testing.assert_close(ours(query, key, eye, center, dropout_p=0.5, seed=3), kept)


def test_gradcheck(backend):
    tensors = [t.requires_grad_() for t in operands(lead=(1, 2), queries=3, keys=6, dim=3, value_dim=2)]
    torch.autograd.gradcheck(lambda *t: ours(*t, width=2), tensors)
    if backend.name == "cpu":
        torch.autograd.gradgradcheck(lambda *t: ours(*t, width=2), tensors)


def test_transforms(backend):
    query, key, value, _ = operands(lead=(2, 2), queries=3, keys=6, dim=3, value_dim=2)
    center = torch.rand(2, 2, 3).double() + 2.1
    transforms.assert_all(lambda *t: ours(*t, width=8), query, key, value, center)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width": -1}, ValueError, "width of at least 0"),
        ({"width": math.nan}, ValueError, "width of at least 0"),
        ({"sigma": 0.0}, ValueError, "sigma above 0"),
        ({"sigma": -1.0}, ValueError, "sigma above 0"),
        ({"center": torch.zeros(8)}, RuntimeError, r"expected center that broadcasts to \[2, 3, 9\], got \[8\]"),
        ({"center": torch.zeros(())}, RuntimeError, "expected center that broadcasts"),
        ({"center": torch.zeros(1, 2, 3, 9)}, RuntimeError, "expected center that broadcasts"),
        ({"center": torch.zeros(9, dtype=torch.bool)}, RuntimeError, "floating or integer"),
        ({"center": torch.zeros(9, device="meta")}, RuntimeError, "same device"),
        ({"query": torch.zeros(8).double()}, RuntimeError, "at least 2 dimensions"),
        ({"key": torch.zeros(2, 3, 20, 7).double()}, RuntimeError, "same last dimension"),
        ({"attn_mask": torch.zeros(9, 19).double()}, RuntimeError, r"expected attn_mask \(..., 20\), got \[9, 19\]"),
    ],
)
def test_messages(options, error, message):
    query, key, value, center = operands()
    arguments = {"query": query, "key": key, "value": value, "center": center, "width": 3} | options
    with pytest.raises(error, match=message):
        local_attention(**arguments)

"""cosine_attention against its formula in float64, and what normalising could let through."""

import math

import pytest
import torch
import torch.nn.functional as F
import transforms
from policy import DTYPES, FLOAT64_ERROR, FLOOR, assert_bitwise, relative_error, run, truth_of

from pynn.ops import cosine_attention, scaled_dot_product_attention

KERNEL = "scaled_dot_product_attention_fwd"
NAMES = ("out", "query", "key", "value", "temperature")


def operands(dtype=torch.float64, lead=(2, 3), queries=9, keys=12, dim=8, value_dim=5):
    """[query, key, value, temperature per head]"""
    tensors = [torch.randn(*lead, *s).to(dtype) for s in ((queries, dim), (keys, dim), (keys, value_dim))]
    return [*tensors, (torch.rand(lead[-1], 1, 1) * 5 + 5).to(dtype)]


def formula(query, key, value, temperature, mask=None):
    scores = temperature * (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def ours(query, key, value, temperature, mask=None):
    return cosine_attention(query, key, value, mask, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(backend, dtype):
    """Against torch's formula, over several problems together: one of them is chance."""
    results: dict[str, list] = {}
    for _ in range(4):
        tensors = operands(dtype, (2, 4), 40, 50, 32, 24)
        grad = torch.randn(2, 4, 40, 24).to(dtype)
        columns = [run(fn, *tensors, grad_output=grad) for fn in (ours, formula)]
        columns.insert(1, truth_of(formula, *tensors, grad_output=grad))
        for name, *triple in zip(NAMES, *((output, *grads) for output, grads in columns), strict=True):
            results.setdefault(name, []).append([t.reshape(-1) for t in triple])
    for name, triples in results.items():
        got, exact, theirs = (torch.cat(tensors) for tensors in zip(*triples, strict=True))
        error, peer = relative_error(got, exact), relative_error(theirs, exact)
        # A gradient of query and key goes through two roundings in 16 bits: of the direction, and of its own.
        limit = FLOAT64_ERROR if dtype is torch.float64 else max(peer, 1.25 * FLOOR[dtype])
        assert error <= limit, f"{name}: error {error:.3e}, torch {peer:.3e}"


def test_options_are_passed_on(backend):
    query, key, value, temperature = operands()
    directions = F.normalize(query, dim=-1) * temperature, F.normalize(key, dim=-1)
    mask = torch.rand(9, 12) < 0.7
    for options in (
        {"is_causal": True},
        {"attn_mask": mask, "return_lse": True, "return_weights": True},
        {"window": (3, 2), "alignment": "lower_right"},
        {"sinks": torch.randn(3).double()},
        {"dropout_p": 0.5, "seed": 7},
    ):
        got = cosine_attention(query, key, value, temperature=temperature, **options)
        expected = scaled_dot_product_attention(*directions, value, scale=1.0, **options)
        for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, expected)), strict=True):
            torch.testing.assert_close(a, b)
    grouped = cosine_attention(query, key[:, :1], value[:, :1], temperature=temperature, enable_gqa=True)
    torch.testing.assert_close(grouped, ours(query, key[:, :1], value[:, :1], temperature))


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (9, 1), (2, 1, 9, 1), (2, 3, 9, 1)], ids=str)
def test_temperatures(backend, shape):
    query, key, value, _ = operands()
    temperature = (torch.rand(shape) * 5).double().requires_grad_()
    out, expected = ours(query, key, value, temperature), formula(query, key, value, temperature)
    torch.testing.assert_close(out, expected)
    got, truth = (torch.autograd.grad(t.square().sum(), temperature)[0] for t in (out, expected))
    assert got.shape == shape
    torch.testing.assert_close(got, truth)
    torch.testing.assert_close(ours(query, key, value, 3.0), formula(query, key, value, 3.0))


def test_lengths_do_not_matter(backend):
    query, key, value, temperature = operands()
    out = ours(query, key, value, temperature)
    torch.testing.assert_close(ours(query * 1e-6, key * 1e6, value, temperature), out)
    large = [t.half() * 2000 for t in (query, key)]  # whose squares are infinite in float16
    halves = ours(*large, value.half(), temperature)
    torch.testing.assert_close(
        halves.double(), ours(*(t.double() for t in large), value, temperature), rtol=0, atol=4e-3
    )


def test_zero_vectors(backend):
    query, key, value, temperature = operands()
    query[0, 0, 1], key[1, 2, 3] = 0, 0
    leaves = [t.requires_grad_() for t in (query, key, value, temperature)]
    out, expected = ours(*leaves), formula(*leaves)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out[0, 0, 1], value[0, 0].mean(0))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_keys_have_no_influence(backend, kind):
    tensors = operands(torch.float32)
    seen = (torch.rand(2, 3, 9, 12) < 0.6) | (torch.arange(12) == 0)
    seen[..., 4], seen[0, 1, 2] = False, False
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    grad = torch.randn(2, 3, 9, 5)
    clean = run(lambda *t: ours(*t, mask), *tensors, grad_output=grad)
    query, key, value, temperature = (t.clone() for t in tensors)
    key[..., 4, :], value[..., 4, :], key[0, 0, 4, 1] = math.nan, math.nan, math.inf
    dirty = run(lambda *t: ours(*t, mask), query, key, value, temperature, grad_output=grad)
    assert_bitwise(dirty[0], clean[0])
    for name, a, b in zip(NAMES[1:], dirty[1], clean[1], strict=True):
        assert_bitwise(a, b, name)
    assert not clean[0][0, 1, 2].any()
    key[0, 0, 0] = math.nan  # every query of that head sees it, but the one that sees nothing
    assert ours(query, key, value, temperature, mask)[0, 0].isnan().all()


def test_gradcheck(backend):
    tensors = [t.requires_grad_() for t in operands(lead=(1, 2), queries=3, keys=4, dim=3, value_dim=2)]
    torch.autograd.gradcheck(ours, tensors)
    if backend.name == "cpu":
        torch.autograd.gradgradcheck(ours, tensors)


def test_transforms(backend):
    transforms.assert_all(ours, *operands(lead=(2, 2), queries=3, keys=4, dim=3, value_dim=2))


def test_autocast(backend):
    tensors = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*tensors)
    assert_bitwise(out, ours(*(t.bfloat16() for t in tensors[:3]), tensors[3]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": 2.0}, TypeError, "expected temperature in place of scale"),
        ({"temperature": torch.ones(3)}, RuntimeError, r"expected temperature that broadcasts to \[2, 3, 9, 1\]"),
        ({"temperature": torch.ones(1, 2, 3, 9, 1)}, RuntimeError, "expected temperature that broadcasts"),
        ({"temperature": torch.ones(3, 1, 1, device="meta")}, RuntimeError, "same device"),
        ({"attn_mask": torch.ones(3, 3)}, RuntimeError, "attn_mask"),
        ({"window": 3}, (TypeError, ValueError), ""),
    ],
)
def test_messages(options, error, message):
    with pytest.raises(error, match=message):
        cosine_attention(*operands()[:3], **options)


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize(
    "way", [lambda t: t[..., :-1, :-1], lambda t: t.long(), lambda t: t.float(), lambda t: t[0, 0, 0]]
)
def test_bad_operands(i, way):
    tensors = operands()[:3]
    tensors[i] = way(tensors[i])
    with pytest.raises(RuntimeError):
        cosine_attention(*tensors)

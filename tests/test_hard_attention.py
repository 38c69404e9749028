"""hard_attention: the choice, and gradients as of one-hot weights that are differentiated as a softmax."""

import math
import sys

import pytest
import torch
import transforms
from policy import DTYPES, assert_bitwise, run

from pynn.ops import hard_attention

KERNEL = "scaled_dot_product_attention_bwd"


def scores_of(query, key, mask=None, scale=None):
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def formula(query, key, value, mask=None):
    """The straight-through estimator as papers write it. Every query has a key."""
    soft = scores_of(query, key, mask).softmax(-1)
    hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach()) @ value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)


def operands(dtype=torch.float64, batch=2, heads=4, key_heads=4, queries=9, keys=12, dim=8, value_dim=5):
    sizes = ((heads, queries, dim), (key_heads, keys, dim), (key_heads, keys, value_dim))
    return [torch.randn(batch, *s).to(dtype) for s in sizes]


@pytest.mark.parametrize("mask_kind", [None, "bool", "float", "row"])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_choice_and_gradients(backend, dtype, key_heads, mask_kind):
    query, key, value = operands(dtype, key_heads=key_heads, queries=40, keys=50)
    mask = None
    if mask_kind == "bool":
        mask = torch.rand(2, 1, 40, 50) > 0.4
        mask[..., 0] = True
    elif mask_kind is not None:
        mask = torch.randn((4, 40, 50) if mask_kind == "float" else (50,)).to(dtype)
    grad = torch.randn(2, 4, 40, 5).to(dtype)
    given = mask if mask_kind in ("float", "row") else None

    def ours(q, k, v, m):
        return hard_attention(q, k, v, mask if m is None else m, enable_gqa=True)

    out, grads = run(ours, query, key, value, given, grad_output=grad)
    index = hard_attention(query, key, value, mask, enable_gqa=True, return_indices=True)[1]
    wide = [t.double() for t in (query, key, value)]
    exact = scores_of(*wide[:2], mask if mask_kind in (None, "bool") else mask.double())
    top = exact.max(-1).values
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert (exact.gather(-1, index[..., None]).squeeze(-1) >= top - tolerance).all()
    repeated = value.repeat_interleave(4 // key_heads, 1)
    assert torch.equal(out, repeated.gather(2, index[..., None].expand(2, 4, 40, 5)))

    wide_mask = None if given is None else given.double()
    expected = run(
        lambda q, k, v, m: formula(q, k, v, mask if m is None else m), *wide, wide_mask, grad_output=grad.double()
    )[1]
    bound = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for got, want in zip(grads, expected, strict=True):
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


def test_ties_go_to_the_first_key_of_any_piece(backend, monkeypatch):
    query, key, value = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 50, 4), torch.randn(1, 2, 50, 4)
    key[:, :, :5] = 0
    monkeypatch.setattr(sys.modules[hard_attention.__module__], "_SCORES", 1)  # pieces of 16 keys
    index = hard_attention(query, key, value, return_indices=True)[1]
    assert (index == 5).all()


def test_masked_keys_have_no_influence(backend):
    query, key, value = operands(torch.float32)
    mask = torch.ones(9, 12, dtype=torch.bool)
    mask[:, 3] = False
    mask[4] = False
    expected = run(lambda q, k, v: hard_attention(q, k, v, mask), query, key, value, grad_output=query[..., :5])
    assert (expected[0][:, :, 4] == 0).all()
    assert (hard_attention(query, key, value, mask, return_indices=True)[1][:, :, 4] == -1).all()
    assert (expected[1][0][:, :, 4] == 0).all()
    key[:, :, 3], value[:, :, 3] = math.nan, math.inf
    spoiled = run(lambda q, k, v: hard_attention(q, k, v, mask), query, key, value, grad_output=query[..., :5])
    assert_bitwise(spoiled[0], expected[0])
    for got, want in zip(spoiled[1], expected[1], strict=True):
        assert_bitwise(got, want)
    assert hard_attention(query, key[:, :, :0], value[:, :, :0]).eq(0).all()


def test_second_derivatives(backend):
    """Of the backward as a function of its operands; the choice has none."""
    query, key, value = (t.requires_grad_() for t in operands(torch.float64, 1, 2, 1, 3, 4, 3, 2))
    grad = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def backward(q, k, v, g):
        return torch.autograd.grad(hard_attention(q, k, v, enable_gqa=True), (q, k, v), g, create_graph=True)

    assert torch.autograd.gradcheck(backward, (query, key, value, grad), eps=1e-7, fast_mode=backend.name != "cpu")


def test_transforms(backend):
    query, key, value = operands(torch.float32, 2, 2, 2, 5, 7, 8, 8)
    for check in ("compiles", "checkpoints", "func_grad", "vmaps"):  # the forward has torch's ops only, for export too
        getattr(transforms, f"assert_{check}")(hard_attention, query, key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (4,)}, "two dimensions or more"),
        ({"key": (2, 4, 12, 7)}, "for query, got"),
        ({"value": (2, 4, 11, 5)}, "for query, got"),
        ({"key": torch.zeros(2, 4, 12, 8, dtype=torch.float64)}, "same floating dtype"),
        ({"attn_mask": torch.zeros(9, 12, dtype=torch.int32)}, "bool, float or query's dtype, got torch.int32"),
        ({"attn_mask": (9, 11)}, "broadcasts to \\(2, 4, 9, 12\\), got \\(9, 11\\)"),
        ({"key": torch.zeros(2, 4, 12, 8, device="meta")}, "same device"),
    ],
    ids=str,
)
def test_errors(change, message):
    arguments = {"query": (2, 4, 9, 8), "key": (2, 4, 12, 8), "value": (2, 4, 12, 5), **change}
    arguments = {name: torch.randn(x) if isinstance(x, tuple) else x for name, x in arguments.items()}
    with pytest.raises(RuntimeError, match=message):
        hard_attention(**arguments)

"""scaled_dot_product_attention of infinities and NaN, and its gradients: as the formula without the masked terms.

In 16 bits the GPU kernels multiply weights as sums of two numbers: an infinity must not meet them as inf - inf.
"""

import math

import pytest
import torch
from policy import DTYPES, assert_nonfinite, run

from pynn.ops.scaled_dot_product_attention import scaled_dot_product_attention as attention

KERNEL = "scaled_dot_product_attention_fwd"


def formula(query, key, value, grad, hidden):
    """(out, grad_query, grad_key, grad_value) of (H, L, D) operands in float64: no sum has a term that is hidden."""

    def total(terms, dim):
        return terms.masked_fill(hidden[..., None], 0).sum(dim)

    query, key, value, grad = (t.double() for t in (query, key, value, grad))
    query, key, value, grad = query[:, :, None], key[:, None], value[:, None], grad[:, :, None]  # (H, Lq, Lk, D)
    scale = 1 / math.sqrt(query.shape[-1])
    scores = (scale * (query * key).sum(-1)).masked_fill(hidden, -math.inf)
    weights = scores.masked_fill(hidden.all(-1, keepdim=True), 0).softmax(-1)
    out = total(weights[..., None] * value, -2)
    to_weights = (grad * value).sum(-1)
    delta = (weights * to_weights).masked_fill(hidden, 0).sum(-1, keepdim=True)
    to_scores = (weights * (to_weights - delta))[..., None]
    return (
        out,
        scale * total(to_scores * key, -2),
        scale * total(to_scores * query, -3),
        total(weights[..., None] * grad, -3),
    )


def spoil(operand, poison):
    """One element; two of the same column that have no sum; and one near the end."""
    operand[:, 1, 1] = poison
    operand[:, 0, 2], operand[:, 2, 2] = poison, -poison
    operand[:, -1, 3] = poison


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("which", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "sinks"])
@pytest.mark.parametrize("shape", [(1, 64), (4, 128), (66, 70), (3, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_the_formula(backend, dtype, shape, kind, which, poison):
    queries, keys = shape
    operands = {
        name: torch.randn(2, n, 16).to(dtype)
        for name, n in (("query", queries), ("key", keys), ("value", keys), ("grad", queries))
    }
    spoilt = operands[which]
    if spoilt.shape[1] > 3:
        spoil(spoilt, poison)
    else:
        spoilt[:, 0, 1] = poison
    hidden, mask = torch.zeros(queries, keys, dtype=torch.bool), None
    if kind == "causal":
        hidden = torch.ones_like(hidden).tril().logical_not()
    elif kind in ("bool", "float"):
        hidden = torch.rand(queries, keys) < 0.3
        mask = hidden.logical_not()
        if kind == "float":
            mask = torch.randn(queries, keys).to(dtype).masked_fill(hidden, -math.inf)
    sinks = (
        torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32) if kind == "sinks" else None
    )

    def ours(q, k, v):
        return attention(q, k, v, mask, is_causal=kind == "causal", sinks=sinks)

    grad = operands.pop("grad")
    out, grads = run(ours, *operands.values(), grad_output=grad)
    hidden = hidden.expand(2, -1, -1)
    results = [("out", out), *zip(("grad_query", "grad_key", "grad_value"), grads, strict=True)]
    if which in ("query", "key"):  # a score of -inf is that of a masked key, and its gradient 0 times infinity
        hidden = hidden | (operands["query"].double() @ operands["key"].double().mT == -math.inf)
        results = results[:1]
    for (name, got), expected in zip(results, formula(*operands.values(), grad, hidden), strict=False):
        assert_nonfinite(got, expected, name)

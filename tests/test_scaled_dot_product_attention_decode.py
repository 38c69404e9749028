"""Attention of a few queries over many keys, as in decoding."""

import pytest
import torch
from policy import DTYPES, assert_elementwise, assert_relative
from test_scaled_dot_product_attention import magnitude, make_mask, reference, torch_results

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

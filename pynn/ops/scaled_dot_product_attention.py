"""scaled_dot_product_attention: softmax(scale Q K^T + mask) V with a fused backward, dropout and mask gradient.

Shapes: query (..., H, Lq, D), key (..., Hk, Lk, D), value (..., Hk, Lk, Dv) -> (..., H, Lq, Dv); H a multiple of Hk.
The ops and their Functions are in _attention_functions.py.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from . import _attention_packed as _packed
from ._attention_composite import broadcast_leading
from ._attention_functions import ScaledDotProductAttention
from ._attention_options import check_causal, per_head, scores_options
from ._attention_weights import AttentionWeights
from ._function import autocast, call, compute_dtype
from .random import make_key

_NAME = "scaled_dot_product_attention"


@overload
def scaled_dot_product_attention(
    *args: Any, return_lse: Literal[False] = False, return_weights: Literal[False] = False, **options: Any
) -> torch.Tensor: ...
@overload
def scaled_dot_product_attention(
    *args: Any, return_lse: bool = False, return_weights: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]: ...
def scaled_dot_product_attention(  # type: ignore[misc]  # the overloads leave the arguments to this signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    alignment: str = "upper_left",
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Attention of every query over the keys: softmax(scale Q K^T + mask) V, with dropout on the softmax.

    A key that is masked (False, -inf or outside of the window) has no influence at all, NaN included; a query whose
    keys are all masked gets 0 and gives no gradient. The gradient of a float mask is summed over its broadcast
    dimensions.

    Args:
        query: (..., H, Lq, D) float64, float32, float16 or bfloat16; at least 2 dimensions.
        key: (..., H, Lk, D), or (..., Hk, Lk, D) with H a multiple of Hk when enable_gqa.
        value: (..., H, Lk, Dv), or (..., Hk, Lk, Dv).
        attn_mask: broadcastable to (..., H, Lq, Lk): bool (True takes part) or float (added to the scores).
        dropout_p: probability of dropping a weight. The draw follows torch.manual_seed.
        is_causal: a query sees no key behind the diagonal. Not together with attn_mask, as in torch; window=(-1, 0) is.
        scale: factor of the scores; 1 / sqrt(D) by default.
        enable_gqa: heads of key and value are shared by groups of query heads.
        window: (left, right): a query sees so many keys before and behind the diagonal, and the one on it; -1 for all.
            Tiles of keys outside of it cost nothing.
        alignment: where the diagonal of is_causal, window and alibi_slopes lies, for Lq != Lk: "upper_left" at key i of
            query i (as is_causal of torch), "lower_right" at key i + Lk - Lq (as FlashAttention; the last query is at
            the last key, which is what a cache of keys wants).
        softcap: c > 0 turns scaled products x into scores c tanh(x / c) before mask and alibi are added: they stay
            between -c and c (Gemma 2, arXiv 2408.00118). None for none.
        alibi_slopes: broadcastable to (..., H); takes slope |j - diagonal| off the score of key j (Press et al. 2022,
            arXiv 2108.12409). No gradient.
        sinks: broadcastable to (..., H): a score per head that takes part in the softmax but has no value (Xiao et al.
            2024, arXiv 2309.17453; gpt-oss). Needs a key.
        cu_seqlens: (N + 1), int32 or int64: where the sequences begin that are packed one behind the other along Lq and
            Lk, and where the last one ends; a pair when those of query and key differ. Each is on its own: a query sees
            keys of its sequence only, and diagonals begin anew. Queries behind the last one see nothing. On a GPU the
            values are not checked.
        return_lse: also return log (exp sink + sum_j exp S_ij), with its gradient: what merging attention over parts of
            the keys needs.
        return_weights: also return the weights of the values, dropout included: a second pass over the scores. Their
            gradient is made of torch's ops.
        generator: where the dropout key is drawn from instead of torch's default CPU generator.
        seed: the dropout key itself; the same seed drops the same weights.
    Nested tensors (N, H, L*, D) in torch's jagged layout are packed sequences too: without attn_mask, cu_seqlens,
    return_lse and return_weights.

    Returns:
        (..., H, Lq, Dv), dtype of query. With return_lse also (..., H, Lq), float32 (float64 for float64); with
        return_weights also (..., H, Lq, Lk), dtype of query.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; dropout_p is not in [0, 1]; attn_mask with is_causal;
            alibi_slopes that require a gradient.
        ValueError: window, alignment or softcap is none of the above.
    """
    if query.is_nested or key.is_nested or value.is_nested:
        if attn_mask is not None or cu_seqlens is not None or return_lse or return_weights:
            raise RuntimeError(
                f"{_NAME}: expected nested tensors without attn_mask, cu_seqlens, return_lse and return_weights"
            )
        (query, query_starts), (key, key_starts) = _packed.packed("query", query), _packed.packed("key", key)
        value = _packed.packed("value", value)[0]
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            None,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            window=window,
            alignment=alignment,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            cu_seqlens=(query_starts, key_starts),
            generator=generator,
            seed=seed,
        )
        return _packed.unpacked(out, query_starts)
    query, key, value = autocast(query, key, value)
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        query, key, value = broadcast_leading(query, key, value, enable_gqa)
    check_causal(_NAME, is_causal, attn_mask)
    width = query.shape[-1] if query.dim() else 1
    left, right, lower_right, *rest = scores_options(_NAME, window, alignment, is_causal, scale, softcap, width)
    numbers = per_head(_NAME, alibi_slopes, sinks, query, query.shape[:-2])
    dropout_key = make_key(query.device, generator=generator, seed=seed) if dropout_p > 0 else None
    ranges = (None, None)
    if cu_seqlens is not None and min(query.dim(), key.dim()) >= 2:
        starts = _packed.checked(cu_seqlens, query, key)
        ranges = _packed.ranges(starts, query, key, left, right, lower_right)
        left, right, lower_right = -1, -1, False
    inputs = (query, key, value, attn_mask, dropout_key, *numbers, *ranges)
    options = (float(dropout_p), left, right, lower_right, *rest)
    out, lse = call(ScaledDotProductAttention, *inputs, *options)
    if not return_lse and not return_weights:
        return out
    sums = (lse.to(compute_dtype(query)),) if return_lse else ()
    if not return_weights:
        return (out, *sums)
    return (out, *sums, call(AttentionWeights, query, key, *inputs[3:], lse.detach(), *options, False))

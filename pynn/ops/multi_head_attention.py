"""multi_head_attention: projection of the tokens, attention of every head, projection of the result, as one op.

Shapes: query (N, L, E), key (N, S, E), value (N, S, E) -> (N, L, E_out). Its Function is in
_multi_head_attention_functions.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._attention_options import check_causal, per_head, scores_options
from ._function import autocast, call, check_devices
from ._multi_head_attention_functions import MultiHeadAttention
from ._multi_head_attention_layout import composed
from .random import make_key
from .rotary_embedding import checked_tables

_NAME = "multi_head_attention"


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    batch_first: bool = True,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    alignment: str = "upper_left",
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    need_weights: bool = False,
    average_attn_weights: bool = True,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762): concat_h(attention(Q_h, K_h, V_h)) W_out^T + b_out.

    Q, K and V are the H, Hk and Hk heads of query W_q^T + b_q and so on; W_q, W_k and W_v are rows of in_proj_weight.
    No tensor of L x S numbers is made, but for weights that are asked for, and none is kept for the backward; in it
    the gradients of all heads are written next to each other, for one product with the tokens. Pass the same tensor
    as key and value, or as all three: it is then projected once.

    Args:
        query: (N, L, E), or (L, E), float64, float32, float16 or bfloat16.
        key: (N, S, E), or (S, E). value: as key.
        in_proj_weight: ((H + 2 Hk) D, E): the rows of query, of key and of value. in_proj_bias: ((H + 2 Hk) D) or None.
        out_proj_weight: (E_out, H D). out_proj_bias: (E_out) or None.
        num_heads: H. num_kv_heads: Hk, a divisor of H; H by default. Each of them serves H / Hk neighbouring heads of
            query (Ainslie et al. 2023, arXiv 2305.13245).
        batch_first: False for (L, N, E) and (S, N, E), of the result too; weights are as with True.
        attn_mask: broadcastable to (N, H, L, S): bool (True takes part) or float (added to the scores).
        key_mask: (N, S), or (S): which keys take part, in the same sense.
        dropout_p, is_causal, window, alignment, softcap, alibi_slopes, sinks, scale, generator, seed: see
            scaled_dot_product_attention.
        rotary: (cos, sin) by which query and key heads are turned before attention, see rotary_embedding; for
            self-attention only (L = S). rotary_interleaved: which channels are a pair, see there.
        need_weights: also return the weights, dropout included. average_attn_weights: their mean over the heads, summed
            without a tensor of all heads.
    Returns:
        (N, L, E_out), and the weights (N, L, S), or (N, H, L, S) when not averaged, or None; without N as query.
    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; and what scaled_dot_product_attention raises.
        ValueError: window, alignment or softcap is none of its values.
    """
    heads, key_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
    same_value = value is key
    same_key = same_value and key is query
    tensors = (query, key, value, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    _check(*tensors, heads, key_heads)
    batched = query.dim() == 3
    if not batched:
        batch_first = True
        query, key, value = query[None], key[None], value[None]
        key_mask = key_mask[None] if key_mask is not None and key_mask.dim() == 1 else key_mask
    query, *others = autocast(query, None if same_key else key, None if same_value else value, *tensors[3:])
    length_dim = 1 if batch_first else 0
    batch, length, keys = query.shape[1 - length_dim], query.shape[length_dim], key.shape[length_dim]
    if key_mask is not None:
        attn_mask = _joined_masks(attn_mask, key_mask, batch, keys)
    else:
        check_causal(_NAME, is_causal, attn_mask)
    width = out_proj_weight.shape[1] // heads
    options = float(dropout_p), *scores_options(_NAME, window, alignment, is_causal, scale, softcap, width)
    cos, sin = (None, None)
    if rotary is not None:
        if length != keys:
            raise RuntimeError(f"{_NAME}: expected as many keys as queries with rotary, got {keys} and {length}")
        cos, sin = checked_tables(query, *rotary, (batch, heads, length, width))
    numbers = per_head(_NAME, alibi_slopes, sinks, query, (batch, heads))
    dropout_key = make_key(query.device, generator=generator, seed=seed) if dropout_p > 0 else None
    inputs = (query, *others, attn_mask, dropout_key, *numbers, cos, sin)
    kind = 0 if not need_weights else 1 if average_attn_weights else 2
    layout = (heads, key_heads, batch_first, rotary_interleaved, kind)
    # Under torch.func the parts are mapped and differentiated as the Functions they are, and so are compiled calls that
    # return weights, whose gradient runs autograd a second time.
    by_parts = torch._C._are_functorch_transforms_active() or (need_weights and torch.compiler.is_compiling())
    results = composed(*inputs, *layout, *options) if by_parts else call(MultiHeadAttention, *inputs, *layout, *options)
    output, weights = results[0], results[1] if need_weights else None
    if not batched:
        output, weights = output[0], None if weights is None else weights[0]
    return output, weights


def _check(query, key, value, in_weight, in_bias, out_weight, out_bias, heads, key_heads):
    check_devices(_NAME, query, key, value, in_weight, in_bias, out_weight, out_bias)
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise RuntimeError(f"{_NAME}: expected query, key and value (N, L, E) or all of them (L, E), got {shapes}")
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise RuntimeError(f"{_NAME}: expected num_kv_heads that divide num_heads, got {key_heads} and {heads}")
    if key.shape[:-1] != value.shape[:-1]:
        raise RuntimeError(f"{_NAME}: expected as many values as keys, got {tuple(value.shape)} and {tuple(key.shape)}")
    width = query.shape[-1]
    if key.shape[-1] != width or value.shape[-1] != width or in_weight.dim() != 2 or in_weight.shape[1] != width:
        raise RuntimeError(
            f"{_NAME}: expected query, key, value and in_proj_weight with the same last dimension, got {width}, "
            f"{key.shape[-1]}, {value.shape[-1]} and in_proj_weight {tuple(in_weight.shape)}"
        )
    if out_weight.dim() != 2 or out_weight.shape[1] % heads:
        raise RuntimeError(f"{_NAME}: expected out_proj_weight (E, {heads} D), got {tuple(out_weight.shape)}")
    rows = (heads + 2 * key_heads) * (out_weight.shape[1] // heads)
    if in_weight.shape[0] != rows:
        raise RuntimeError(
            f"{_NAME}: expected in_proj_weight of {rows} rows, for {heads} heads of query and twice {key_heads} of "
            f"width {out_weight.shape[1] // heads}, got {tuple(in_weight.shape)}"
        )
    for name, bias, size in (("in_proj_bias", in_bias, rows), ("out_proj_bias", out_bias, out_weight.shape[0])):
        if bias is not None and bias.shape != (size,):
            raise RuntimeError(f"{_NAME}: expected {name} ({size}), got {tuple(bias.shape)}")


def _joined_masks(attn_mask, key_mask, batch, keys):
    """Both masks as one for the op."""
    if key_mask.shape != (batch, keys):
        raise RuntimeError(f"{_NAME}: expected key_mask {(batch, keys)}, got {tuple(key_mask.shape)}")
    key_mask = key_mask[:, None, None]
    if attn_mask is None:
        return key_mask
    if attn_mask.dtype == key_mask.dtype == torch.bool:
        return attn_mask & key_mask
    if attn_mask.dtype == torch.bool:
        attn_mask, key_mask = key_mask, attn_mask
    return attn_mask.masked_fill(~key_mask, -math.inf) if key_mask.dtype == torch.bool else attn_mask + key_mask

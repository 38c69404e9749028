"""MultiheadAttention on the fused attention op."""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch.nn import functional as F

from ..ops.scaled_dot_product_attention import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with fused attention: same arguments, parameters, initial weights and state_dict.

    Two things differ. A query whose keys are all masked gets zeros (torch: NaN for the whole batch) and gives no
    gradient, with need_weights too. is_causal without attn_mask raises in every mode (torch ignores it when it takes
    its inference path).
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of query over key and value.

        Args:
            query: (L, N, E), (N, L, E) with batch_first, or (L, E).
            key: (S, N, kdim), (N, S, kdim) with batch_first, or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) with batch_first, or (S, vdim).
            key_padding_mask: (N, S) or (S), bool (True is ignored) or float (added to the scores).
            need_weights: also return the weights, after dropout; costs a second pass over the scores.
            attn_mask: (L, S) or (N * num_heads, L, S), bool (True is not allowed to attend) or float (added).
            average_attn_weights: average the weights over the heads.
            is_causal: hint that attn_mask is the causal mask; used instead of it when nothing else needs the mask.
        Returns:
            Output of query's layout, and the weights (N, L, S), (N, num_heads, L, S) when not averaged, or None.
        Raises:
            AssertionError, RuntimeError: as torch.nn.MultiheadAttention.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:
            attn_mask = None

        sequence_dim = 1 if self.batch_first or not batched else 0
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch, length, keys = q.shape[1 - sequence_dim], q.shape[sequence_dim], k.shape[sequence_dim]
        mask = self._merge(key_padding_mask, attn_mask, batch, length, keys)
        k, v = self._append(k, v, sequence_dim)
        if mask is not None and k.shape[sequence_dim] > keys:
            shape = (*mask.shape[:-1], k.shape[sequence_dim] - keys)
            mask = torch.cat((mask, mask.new_full(shape, mask.dtype == torch.bool)), -1)
        q, k, v = (self._split_heads(t, sequence_dim) for t in (q, k, v))  # (N, H, L, D)

        dropout_p = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            output, attention = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, return_weights=True)
        else:
            output = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
        output = output.transpose(1, 2) if sequence_dim == 1 else output.permute(2, 0, 1, 3)
        output = F.linear(output.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if not batched:
            output, attention = output.squeeze(0), None if attention is None else attention.squeeze(0)
        return output, attention

    def _check(self, query, key, value, key_padding_mask, attn_mask):
        """Whether the input is batched; raises what torch.nn.MultiheadAttention raises."""
        if query.dim() not in (2, 3):
            raise AssertionError(
                f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor"
            )
        rank = query.dim()
        kind = f"For {'batched (3-D)' if rank == 3 else 'unbatched (2-D)'} `query`, expected"
        if key.dim() != rank or value.dim() != rank:
            raise AssertionError(
                f"{kind} `key` and `value` to be {rank}-D "
                f"but found {key.dim()}-D and {value.dim()}-D tensors respectively"
            )
        if key_padding_mask is not None and key_padding_mask.dim() != rank - 1:
            raise AssertionError(
                f"{kind} `key_padding_mask` to be `None` or {rank - 1}-D "
                f"but found {key_padding_mask.dim()}-D tensor instead"
            )
        if attn_mask is not None and attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"{kind} `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
            )
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported")
        if key_padding_mask is not None and attn_mask is not None and key_padding_mask.dtype != attn_mask.dtype:
            warnings.warn(
                "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
                stacklevel=3,
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(
                f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
            )
        if rank == 3 and query.shape[1 - self.batch_first] != key.shape[1 - self.batch_first]:
            raise RuntimeError(
                f"expected query and key with the same batch size, got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        return rank == 3

    def _project(self, query, key, value):
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            packed = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), packed, bias, strict=True))
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if key is value:
            split = (self.embed_dim, 2 * self.embed_dim)
            query_weight, weight = self.in_proj_weight.split(split)
            rest = None if self.in_proj_bias is None else self.in_proj_bias[self.embed_dim :]
            return (F.linear(query, query_weight, bias[0]), *F.linear(key, weight, rest).chunk(2, -1))
        weights = self.in_proj_weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, bias, strict=True))

    def _merge(self, key_padding_mask, attn_mask, batch, length, keys):
        """Both masks as one for the op: bool with True for keys that take part, or float."""
        if attn_mask is not None:
            shape = (length, keys) if attn_mask.dim() == 2 else (batch * self.num_heads, length, keys)
            if attn_mask.shape != shape:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {shape}."
                )
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.unflatten(0, (batch, self.num_heads))
        if key_padding_mask is not None:
            if key_padding_mask.shape != (batch, keys):
                raise AssertionError(
                    f"Expected key_padding_mask.shape to be {(batch, keys)}, but got {tuple(key_padding_mask.shape)}"
                )
            key_padding_mask = key_padding_mask[:, None, None, :]
        masks = [m for m in (attn_mask, key_padding_mask) if m is not None]
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            blocked = masks[0] if len(masks) == 1 else masks[0] | masks[1]
            return blocked.logical_not()
        dtype = next(m.dtype for m in masks if m.dtype != torch.bool)
        zero = masks[0].new_zeros((), dtype=dtype)
        floats = (torch.where(m, -math.inf, zero) if m.dtype == torch.bool else m for m in masks)
        return functools.reduce(torch.add, floats)

    def _append(self, k, v, sequence_dim):
        """Adds bias_k, bias_v and the zero key along the sequence."""
        shape = list(k.shape)
        shape[sequence_dim] = 1
        more_keys, more_values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            more_keys.append(self.bias_k.to(k.dtype).expand(shape))
            more_values.append(self.bias_v.to(v.dtype).expand(shape))
        if self.add_zero_attn:
            more_keys.append(k.new_zeros(shape))
            more_values.append(v.new_zeros(shape))
        if not more_keys:
            return k, v
        return torch.cat([k, *more_keys], sequence_dim), torch.cat([v, *more_values], sequence_dim)

    def _split_heads(self, x, sequence_dim):
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if sequence_dim == 1 else heads.permute(1, 2, 0, 3)

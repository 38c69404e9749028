"""MultiheadAttention on the fused attention op."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import torch
from torch.nn import functional as F

from ..ops.multi_head_attention import multi_head_attention
from ..ops.scaled_dot_product_attention import scaled_dot_product_attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with fused attention: same arguments, parameters, initial weights and state_dict.

    Two things differ. A query whose keys are all masked gets zeros (torch: NaN for the whole batch) and gives no
    gradient, with need_weights too. is_causal without attn_mask raises in every mode (torch ignores it when it takes
    its inference path).

    What torch's layer does not have, as keywords of the constructor:

    Args:
        num_kv_heads: heads of key and value, each of which serves num_heads / num_kv_heads heads of query; then
            in_proj_weight has (num_heads + 2 num_kv_heads) * head_dim rows. Not with add_bias_kv, add_zero_attn, kdim,
            vdim.
        window: (left, right): a query sees so many keys before and behind its own place, -1 for all.
        sinks: learns a score per head that takes part in the softmax but has no value (`sinks`, zeros at first).
        strict_torch_nan: calls with a mask run torch's own code, for its NaN where a query has no key, bit for bit.
            Not with the other three.
    Raises:
        ValueError: as torch.nn.MultiheadAttention, and for options that exclude each other.
    """

    # Of the class: `pynn.patch` makes layers of torch that were built without them into such layers.
    num_kv_heads: int | None = None
    window: tuple[int, int] | None = None
    strict_torch_nan = False
    sinks: torch.nn.Parameter | None

    def __init__(
        self,
        *args: Any,
        num_kv_heads: int | None = None,
        window: tuple[int, int] | None = None,
        sinks: bool = False,
        strict_torch_nan: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if strict_torch_nan and (num_kv_heads is not None or window is not None or sinks):
            raise ValueError("MultiheadAttention: torch has no num_kv_heads, window and sinks for strict_torch_nan")
        self.window, self.strict_torch_nan = window, strict_torch_nan
        like = self.out_proj.weight
        if num_kv_heads is not None:
            if not self._qkv_same_embed_dim or self.bias_k is not None or self.add_zero_attn:
                raise ValueError(
                    "MultiheadAttention: expected num_kv_heads without add_bias_kv, add_zero_attn, kdim and vdim"
                )
            if num_kv_heads < 1 or self.num_heads % num_kv_heads:
                raise ValueError(
                    f"MultiheadAttention: expected num_kv_heads that divide {self.num_heads}, got {num_kv_heads}"
                )
            self.num_kv_heads = num_kv_heads
            rows = (self.num_heads + 2 * num_kv_heads) * self.head_dim
            self.in_proj_weight = torch.nn.Parameter(like.new_empty((rows, self.embed_dim)))
            torch.nn.init.xavier_uniform_(self.in_proj_weight)
            if self.in_proj_bias is not None:
                self.in_proj_bias = torch.nn.Parameter(like.new_zeros(rows))
        self.register_parameter("sinks", torch.nn.Parameter(like.new_zeros(self.num_heads)) if sinks else None)

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
        *,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        alibi_slopes: torch.Tensor | None = None,
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
            rotary: (cos, sin) that turn the heads of query and key, see pynn.ops.multi_head_attention.
            alibi_slopes: (num_heads), see pynn.ops.scaled_dot_product_attention.
        Returns:
            Output of query's layout, and the weights (N, L, S), (N, num_heads, L, S) when not averaged, or None.
        Raises:
            AssertionError, RuntimeError: as torch.nn.MultiheadAttention.
            ValueError: rotary with add_bias_kv, add_zero_attn, kdim or vdim.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        if self.strict_torch_nan and (attn_mask is not None or key_padding_mask is not None):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:
            attn_mask = None

        if not batched:
            # One tensor stays one tensor, which is projected once.
            same_key, same_value = key is query, value is key
            query = query.unsqueeze(0)
            key = query if same_key else key.unsqueeze(0)
            value = key if same_value else value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        sequence_dim = 1 if self.batch_first or not batched else 0
        batch, length, keys = query.shape[1 - sequence_dim], query.shape[sequence_dim], key.shape[sequence_dim]
        mask = self._merge(key_padding_mask, attn_mask, batch, length, keys)
        options: dict[str, Any] = {
            "attn_mask": mask,
            "dropout_p": self.dropout if self.training else 0.0,
            "is_causal": is_causal,
            "window": self.window,
            "alibi_slopes": alibi_slopes,
            "sinks": self._parameters.get("sinks"),
        }
        if self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn:
            output, attention = multi_head_attention(
                query,
                key,
                value,
                self.in_proj_weight,
                self.in_proj_bias,
                self.out_proj.weight,
                self.out_proj.bias,
                self.num_heads,
                num_kv_heads=self.num_kv_heads,
                batch_first=sequence_dim == 1,
                rotary=rotary,
                need_weights=need_weights,
                average_attn_weights=average_attn_weights,
                **options,
            )
        else:
            if rotary is not None:
                raise ValueError(
                    "MultiheadAttention: expected rotary without add_bias_kv, add_zero_attn, kdim and vdim"
                )
            output, attention = self._by_parts(query, key, value, sequence_dim, need_weights, options)
            if attention is not None and average_attn_weights:
                attention = attention.mean(1)
        if not batched:
            output, attention = output.squeeze(0), None if attention is None else attention.squeeze(0)
        return output, attention

    def _by_parts(self, query, key, value, sequence_dim, need_weights, options):
        """With separate projections, or keys that are appended: those that the op does not make."""
        q, k, v = self._project(query, key, value)
        keys = k.shape[sequence_dim]
        k, v = self._append(k, v, sequence_dim)
        mask = options["attn_mask"]
        if mask is not None and k.shape[sequence_dim] > keys:
            shape = (*mask.shape[:-1], k.shape[sequence_dim] - keys)
            mask = torch.cat((mask, mask.new_full(shape, mask.dtype == torch.bool)), -1)
        q, k, v = (self._split_heads(t, sequence_dim) for t in (q, k, v))  # (N, H, L, D)
        options = {**options, "attn_mask": mask}
        results = scaled_dot_product_attention(q, k, v, return_weights=need_weights, **options)
        output, attention = results if need_weights else (results, None)
        output = output.transpose(1, 2) if sequence_dim == 1 else output.permute(2, 0, 1, 3)
        return F.linear(output.flatten(2), self.out_proj.weight, self.out_proj.bias), attention

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
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
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

"""torch's own scaled_dot_product_attention on pynn's kernels, for code that shall not be changed.

    import pynn
    torch.nn.attention.activate_flash_attention_impl("pynn")    # until restore_flash_attention_impl()

`import pynn` tells torch the name, and nothing changes before it is activated. Then the calls that torch would give to
its flash attention run here: on a CPU those without dropout whose mask needs no gradient, on a GPU those in float16 and
bfloat16 without a mask. All others stay what they are.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.attention
from torch import Tensor

from .. import backends
from ._attention_functions import lse_dtype
from .random import make_key

NAME = "pynn"
_FORWARD, _BACKWARD = "scaled_dot_product_attention_fwd", "scaled_dot_product_attention_bwd"


class _Handle:
    """What torch keeps while the implementation is active."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library = library

    def remove(self) -> None:
        """Gives torch's kernels back."""
        self._library._destroy()


def register() -> None:
    """Makes the name known to torch, in versions that have the hook."""
    hook = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if hook is not None:
        hook(NAME, register_fn=_activate)


def _activate() -> _Handle:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that torch's kernels are replaced, which was asked for
        warnings.simplefilter("ignore")
        library.impl("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, "CPU")
        library.impl("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, "CPU")
        if not backends.unavailable["cuda"]:
            library.impl("_scaled_dot_product_flash_attention", _gpu_forward, "CUDA")
            library.impl("_scaled_dot_product_flash_attention_backward", _gpu_backward, "CUDA")
    return _Handle(library)


def _options(query: Tensor, dropout_p: float, is_causal: bool, scale: float | None) -> tuple:
    """The last arguments of the ops: dropout_p, left, right, lower_right, scale, softcap."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return dropout_p, -1, 0 if is_causal else -1, False, scale, 0.0


def _sums(lse: Tensor, query: Tensor) -> Tensor:
    """The log-sum-exps as torch has them: float32 for all but float64."""
    return lse.to(torch.float64 if query.dtype is torch.float64 else torch.float32)


def _own_sums(lse: Tensor, query: Tensor) -> Tensor:
    """The same as pynn's backward has them."""
    return lse.contiguous().to(lse_dtype(query.dtype))


def _cpu_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    op = backends.op(_FORWARD, query)
    out, lse = op(query, key, value, attn_mask, *(None,) * 5, *_options(query, 0.0, is_causal, scale))
    # Compiled code relies on torch's strides: those of the query, and sums stored as (B, L, H).
    like = torch.empty_like(query)
    out = out if out.stride() == like.stride() else like.copy_(out)
    return out, _sums(lse, query).transpose(1, 2).contiguous().transpose(1, 2)


def _cpu_backward(grad_out, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    options = *_options(query, 0.0, is_causal, scale), False, False
    op = backends.op(_BACKWARD, query)
    inputs = grad_out, None, query, key, value, attn_mask, *(None,) * 5, out, _own_sums(lse, query)
    return op(*inputs, *options)[:3]


def _gpu_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask:
        raise RuntimeError(f'flash attention "{NAME}": return_debug_mask is not supported')
    dropout_key = None
    if dropout_p > 0:  # drawn on the device, as in a CUDA graph it has to be
        dropout_key = make_key(query.device, generator=torch.cuda.default_generators[query.device.index])
    op = backends.op(_FORWARD, query)
    out, lse = op(query, key, value, None, dropout_key, *(None,) * 4, *_options(query, dropout_p, is_causal, scale))
    nothing = query.new_empty(0)
    state = query.new_empty(0, dtype=torch.int64) if dropout_key is None else dropout_key
    return out, _sums(lse, query), None, None, query.shape[-2], key.shape[-2], state, nothing, nothing


def _gpu_backward(
    grad_out, query, key, value, out, lse, _q, _k, max_q, max_k, dropout_p, is_causal, state, _, *, scale=None
):
    dropout_key = state if dropout_p > 0 else None
    options = *_options(query, dropout_p, is_causal, scale), False, False
    op = backends.op(_BACKWARD, query)
    inputs = grad_out, None, query, key, value, None, dropout_key, *(None,) * 4, out, _own_sums(lse, query)
    return op(*inputs, *options)[:3]

"""The attention of Hugging Face transformers' models on pynn's kernel: "pynn" in its attention interface.

transformers hands every attention layer a function of (module, query, key, value, mask, ...) by the name in the model's
configuration; `pynn.patch` registers one and changes that name. Nothing here imports transformers before a model of it
is patched.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from . import ops

NAME = "pynn"
SDPA = "sdpa"  # the implementation with the same masks and the same results


def is_model(module: torch.nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    transformers = sys.modules.get("transformers")  # a model of it exists only where it was imported
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def implementations(model: Any) -> set[str]:
    """The names of the attention implementations of a model and of the models inside it."""
    return {module.config._attn_implementation for module in model.modules() if is_model(module)}


def why_kept(model: Any) -> str:
    """Why the attention of a model of transformers cannot be replaced; '' when it can."""
    names, models = implementations(model), [module for module in model.modules() if is_model(module)]
    # Models with soft caps or sinks are "eager" since sdpa has neither; others are because somebody wants the weights.
    lacks_sdpa = names == {"eager"} and not any(module._supports_sdpa for module in models)
    if names != {SDPA} and not lacks_sdpa:
        return f"its attention implementation is {', '.join(sorted(map(str, names)))}, not {SDPA}"
    if not all(module._can_set_attn_implementation() for module in models):
        return "its attention is written out, not called through transformers' interface"
    return ""


def use(model: Any, name: str) -> None:
    """Makes a model, and the models inside it, attend with the implementation of this name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS[SDPA])
    model.set_attn_implementation(name)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An implementation for transformers' attention interface.

    Args:
        module: the attention layer; its is_causal counts where the argument is None.
        query: (B, H, Lq, D). key, value: (B, Hk, Lk, D), H a multiple of Hk.
        attention_mask: bool or float, broadcastable to (B, H, Lq, Lk); without one, causal layers mask the future.
        dropout: probability. scaling: factor of the scores, 1 / sqrt(D) by default.
        position_bias: added to the scores, as in T5. softcap: of the scores, as in Gemma 2. s_aux: (H) sinks, as in
            gpt-oss.
    Returns:
        (B, Lq, H, D), and no weights.
    Raises:
        ValueError: the model asks for a paged cache.
    """
    if options.get("cache") is not None:
        raise ValueError(f'attention implementation "{NAME}": a paged cache is not supported, got {options["cache"]!r}')
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        if attention_mask is None:
            attention_mask = position_bias
        elif attention_mask.dtype == torch.bool:
            attention_mask = position_bias.masked_fill(~attention_mask, float("-inf"))
        else:
            attention_mask = position_bias + attention_mask
    grouped = key.shape[1] != query.shape[1]
    window = (-1, 0) if causal else None  # beside a mask, unlike is_causal
    output = ops.scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        scale=scaling,
        enable_gqa=grouped,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous(), None

"""What transformers are made of: attention with a cache, masks, and the block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.key_value_cache import KeyValueCache
from ..ops.scaled_dot_product_attention import scaled_dot_product_attention
from ._positions import RotaryEmbedding


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
}


def activation_named(owner: str, name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"{owner}: expected activation to be one of {tuple(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def check_tokens(model: str, name: str, ids: Tensor, longest: int | None = None) -> None:
    """Raises ValueError unless ids is (B, L) int64 or int32 with 1 <= L <= longest."""
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.shape[1] < 1:
        raise ValueError(
            f"{model}: expected {name} of shape (B, L) and dtype int64, got {tuple(ids.shape)} {ids.dtype}"
        )
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"{model}: expected {name} of at most {longest} tokens, got {ids.shape[1]}")


def key_mask(model: str, attention_mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """(B, L) with true where a token takes part, as the (B, 1, 1, L) bool mask of the attention op."""
    if attention_mask is None:
        return None
    if attention_mask.shape != shape:
        got = tuple(attention_mask.shape)
        raise ValueError(f"{model}: expected attention_mask of shape {tuple(shape)}, got {got}")
    return attention_mask.bool()[:, None, None, :]


class Attention(nn.Module):
    """Multi-head attention, batch first, with torch.nn.MultiheadAttention's parameters and initial weights.

    What that layer lacks: another scale, heads whose width is not width / heads, a cache, rotary positions, and a bias
    on the scores.

    Args:
        width: of input and output. heads: H.
        head_width: D; None for width / heads.
        bias: of the projections. dropout: probability of dropping an attention weight, in training.
        scale: factor of the scores; None for 1 / sqrt(D).
    Raises:
        ValueError: heads does not divide width and head_width is None.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(f"Attention: expected heads to divide width, got {heads} and {width}")
        self.heads, self.dropout, self.scale = heads, dropout, scale
        inner = heads * (width // heads if head_width is None else head_width)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: RotaryEmbedding | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attention of x over memory, or over itself.

        Args:
            x: (B, L, width). memory: (B, S, width).
            mask: broadcastable to (B, H, L, S): bool (true takes part) or float (added to the scores).
            is_causal: token i sees tokens 0 .. i, those in the cache included.
            rotary: turns queries and keys.
            cache: keys and values of earlier tokens, to which those of x are added; or those of the memory, once.
        Returns:
            (B, L, width).
        """

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        past = 0 if cache is None else cache.used
        if memory is None:
            query, key, value = map(heads, F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        else:
            inner = self.out_proj.in_features
            weights = self.in_proj_weight.split((inner, 2 * inner))
            biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split((inner, 2 * inner))
            query = heads(F.linear(x, weights[0], biases[0]))
            if cache is not None and past > 0:
                key, value = cache.stored()
            else:
                key, value = map(heads, F.linear(memory, weights[1], biases[1]).chunk(2, dim=-1))
        if rotary is not None:
            query, key = rotary(query, past), rotary(key, past)
        if cache is not None and (memory is None or past == 0):
            key, value = cache.append(key, value)  # (B, H, past + L, D)
        dropout = self.dropout if self.training else 0.0
        window = (-1, 0) if is_causal else None  # beside a mask, unlike the op's is_causal
        output = scaled_dot_product_attention(
            query, key, value, mask, dropout, scale=self.scale, window=window, alignment="lower_right"
        )
        return self.out_proj(output.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention, optionally attention over a memory, and a two-layer network, each around a residual connection.

    norm="pre":   x = x + attention(norm1(x));   x = x + network(norm2(x))
    norm="post":  x = norm1(x + attention(x));   x = norm2(x + network(x))        (Vaswani et al., arXiv 1706.03762)

    The parameters are named as in torch.nn.TransformerEncoderLayer and, with cross_attention, TransformerDecoderLayer.

    Args:
        width: of the tokens. heads: H. mlp_width: hidden width of the network.
        norm: "pre" or "post". activation: relu, gelu, gelu_tanh, quick_gelu or silu.
        rms: RMS normalisation (no mean, no bias) instead of layer normalisation. bias: of linear layers and norms.
        dropout: on attention weights, hidden layer and both sums. eps: of the norms.
        cross_attention: adds attention over `memory` between the two.
        head_width, scale: of the attention, see Attention.
        gated: the hidden layer is multiplied by a linear one (Shazeer, "GLU variants", https://arxiv.org/abs/2002.05202).
    Raises:
        ValueError: an unknown norm or activation, or heads that do not divide width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        norm: str = "pre",
        activation: str = "gelu",
        rms: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        eps: float = 1e-5,
        cross_attention: bool = False,
        head_width: int | None = None,
        scale: float | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f'TransformerBlock: expected norm to be "pre" or "post", got {norm!r}')
        self.activation = activation_named("TransformerBlock", activation)
        self.pre = norm == "pre"

        def attention() -> Attention:
            return Attention(width, heads, head_width, bias, dropout, scale)

        self.self_attn = attention()
        self.multihead_attn = attention() if cross_attention else None
        self.linear1 = nn.Linear(width, mlp_width, bias=bias)
        self.gate = nn.Linear(width, mlp_width, bias=bias) if gated else None
        self.linear2 = nn.Linear(mlp_width, width, bias=bias)
        self.norm1 = make_norm(width, eps, rms, bias)
        self.norm2 = make_norm(width, eps, rms, bias)
        self.norm3 = make_norm(width, eps, rms, bias) if cross_attention else None
        self.dropout = nn.Dropout(dropout)

    def _network(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.linear1(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.linear2(self.dropout(hidden))

    def _residual(self, x: Tensor, norm: nn.Module, function: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre:
            return x + self.dropout(function(norm(x)))
        return norm(x + self.dropout(function(x)))

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        is_causal: bool = False,
        rotary: RotaryEmbedding | None = None,
        cache: KeyValueCache | None = None,
        memory_cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, L, width) to the same; memory (B, S, width) if built with cross_attention. Masks, caches as in Attention.

        Raises:
            ValueError: memory is missing, or given to a block without cross_attention.
        """
        if (memory is None) != (self.multihead_attn is None):
            has = "without" if self.multihead_attn is None else "with"
            given = "no memory" if memory is None else "a memory"
            raise ValueError(f"TransformerBlock: got {given}, but the block was built {has} cross_attention")
        x = self._residual(x, self.norm1, lambda h: self.self_attn(h, None, mask, is_causal, rotary, cache))
        last = self.norm2
        if self.multihead_attn is not None and self.norm3 is not None:
            attend = self.multihead_attn
            x = self._residual(x, self.norm2, lambda h: attend(h, memory, memory_mask, cache=memory_cache))
            last = self.norm3
        return self._residual(x, last, self._network)


def make_norm(width: int, eps: float, rms: bool = False, bias: bool = True) -> nn.Module:
    return nn.RMSNorm(width, eps) if rms else nn.LayerNorm(width, eps, bias=bias)


class Stack(nn.Module):
    """Blocks one after the other, and a normalisation after the last; named as in torch.nn.TransformerEncoder."""

    def __init__(self, blocks: list[TransformerBlock], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        *arguments,
        caches: Sequence[KeyValueCache] | None = None,
        memory_caches: Sequence[KeyValueCache] | None = None,
        **options,
    ) -> Tensor:
        for i, block in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            memory_cache = None if memory_caches is None else memory_caches[i]
            x = block(x, *arguments, cache=cache, memory_cache=memory_cache, **options)
        return x if self.norm is None else self.norm(x)


def normal_init(module: nn.Module, std: float = 0.02) -> None:
    """BERT's and GPT's initialisation: normal weights, biases at zero."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)

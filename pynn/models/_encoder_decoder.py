"""The encoder-decoders: the original transformer, on embedded tokens, and T5."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.key_value_cache import KeyValueCache
from ._generation import extend, sampler
from ._positions import RelativePositionBias
from ._transformer import (
    Stack,
    TransformerBlock,
    check_tokens,
    key_mask,
    make_norm,
)


class Transformer(nn.Module):
    """The encoder-decoder on embedded tokens, with torch.nn.Transformer's parameters, batch first.

    Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762.

    Args:
        width: of the tokens. heads: of each attention. encoder_layers, decoder_layers: number of blocks.
        mlp_width: hidden width of the blocks' networks. dropout, activation, norm, eps, bias: see TransformerBlock.
    Raises:
        ValueError: see TransformerBlock.
    """

    def __init__(
        self,
        width: int = 512,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        mlp_width: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        norm: str = "post",
        eps: float = 1e-5,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.width = width

        def stack(layers: int, cross_attention: bool) -> Stack:
            options: dict[str, Any] = {
                "norm": norm,
                "activation": activation,
                "bias": bias,
                "dropout": dropout,
                "eps": eps,
            }
            blocks = [
                TransformerBlock(width, heads, mlp_width, cross_attention=cross_attention, **options)
                for _ in range(layers)
            ]
            return Stack(blocks, make_norm(width, eps, bias=bias))

        self.encoder = stack(encoder_layers, False)
        self.decoder = stack(decoder_layers, True)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def _check(self, name: str, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"Transformer: expected {name} of shape (B, L, {self.width}), got {tuple(x.shape)}")

    def encode(self, source: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """(B, S, width) to the memory (B, S, width); source_mask: (B, S), true where a token takes part."""
        self._check("source", source)
        return self.encoder(source, mask=key_mask("Transformer", source_mask, source.shape[:2]))

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        target_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        is_causal: bool = True,
    ) -> Tensor:
        """(B, T, width) and the memory (B, S, width) to (B, T, width); masks (B, T) and (B, S) as in encode."""
        self._check("target", target)
        self._check("memory", memory)
        mask = key_mask("Transformer", target_mask, target.shape[:2])
        memory_keys = key_mask("Transformer", memory_mask, memory.shape[:2])
        return self.decoder(target, memory, mask, memory_keys, is_causal)

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        is_causal: bool = True,
    ) -> Tensor:
        """The decoder's output.

        Args:
            source: (B, S, width). target: (B, T, width), shifted right.
            source_mask, target_mask: (B, S) and (B, T), true where a token takes part; None for all.
            is_causal: target token i sees tokens 0 .. i of the target.
        Returns:
            (B, T, width).
        Raises:
            ValueError: shapes do not fit.
        """
        memory = self.encode(source, source_mask)
        return self.decode(target, memory, target_mask, source_mask, is_causal)


class T5(nn.Module):
    """T5: the encoder-decoder with relative positions, RMS normalisation and unscaled attention.

    Raffel et al., https://arxiv.org/abs/1910.10683. gated=True, tied=False, activation="gelu_tanh" is T5 v1.1.

    Args:
        vocab_size: tokens. width, layers, heads: of encoder and decoder. mlp_width: None for 4 width.
        head_width: None for width / heads. decoder_layers: None for layers.
        buckets, max_distance: see RelativePositionBias.
        dropout, activation, gated, eps: see TransformerBlock.
        tied: the output layer shares the token embedding's weights (and divides by sqrt(width)).
    Raises:
        ValueError: see TransformerBlock.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        mlp_width: int | None = None,
        head_width: int | None = None,
        decoder_layers: int | None = None,
        buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.1,
        activation: str = "relu",
        gated: bool = False,
        tied: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        mlp_width = 4 * width if mlp_width is None else mlp_width

        def stack(layers: int, cross_attention: bool) -> Stack:
            blocks = []
            for _ in range(layers):
                block = TransformerBlock(
                    width,
                    heads,
                    mlp_width,
                    norm="pre",
                    activation=activation,
                    rms=True,
                    bias=False,
                    dropout=dropout,
                    eps=eps,
                    cross_attention=cross_attention,
                    head_width=head_width,
                    scale=1.0,
                    gated=gated,
                )
                blocks.append(block)
            return Stack(blocks, make_norm(width, eps, rms=True))

        self.width = width
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.encoder_bias = RelativePositionBias(heads, buckets, max_distance, bidirectional=True)
        self.decoder_bias = RelativePositionBias(heads, buckets, max_distance, bidirectional=False)
        self.encoder = stack(layers, False)
        self.decoder = stack(layers if decoder_layers is None else decoder_layers, True)
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if name.endswith("in_proj_weight"):  # unscaled scores: queries start small instead
                inner = parameter.shape[0] // 3
                nn.init.normal_(parameter, std=width**-0.5)
                nn.init.normal_(parameter[:inner], std=(width * inner / heads) ** -0.5)
            elif parameter.dim() > 1 and name != "token_embedding.weight":  # fan-in; embeddings of distances: width
                fan_in = width if name.endswith("embedding.weight") else parameter.shape[1]
                nn.init.normal_(parameter, std=fan_in**-0.5)

    def encode(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, S) tokens to (B, S, width); attention_mask: (B, S), true where a token takes part."""
        check_tokens("T5", "ids", ids)
        bias = self.encoder_bias(ids.shape[1], ids.shape[1])
        keys = key_mask("T5", attention_mask, ids.shape)
        if keys is not None:
            bias = bias.masked_fill(~keys, -math.inf)
        x = self.encoder(self.dropout(self.token_embedding(ids)), mask=bias)
        return self.dropout(x)

    def decode(
        self,
        ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        caches: tuple[list[KeyValueCache], list[KeyValueCache]] | None = None,
    ) -> Tensor:
        """Logits of the token after each.

        Args:
            ids: (B, T) int64. memory: (B, S, width), of `encode`. memory_mask: (B, S).
            caches: those of the tokens before ids and of the memory, from `caches`; the new ones are added.
        Returns:
            (B, T, vocab_size).
        """
        check_tokens("T5", "decoder_ids", ids)
        keys = key_mask("T5", memory_mask, memory.shape[:2])
        own, crossed = caches or (None, None)
        bias = self.decoder_bias(ids.shape[1], ids.shape[1] + (own[0].used if own else 0))
        x = self.token_embedding(ids)
        x = self.decoder(self.dropout(x), memory, bias, keys, True, caches=own, memory_caches=crossed)
        x = self.dropout(x)
        if self.head is not None:
            return self.head(x)
        return F.linear(x * self.width**-0.5, self.token_embedding.weight)

    def forward(self, ids: Tensor, decoder_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token after each of the decoder's.

        Args:
            ids: (B, S) int64, the input. decoder_ids: (B, T) int64, the output shifted right.
            attention_mask: (B, S), true where a token takes part; None for all.
        Returns:
            (B, T, vocab_size).
        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        memory = self.encode(ids, attention_mask)
        return self.decode(decoder_ids, memory, attention_mask)

    def caches(self, length: int, memory_length: int) -> tuple[list[KeyValueCache], list[KeyValueCache]]:
        """Empty caches for `decode` of `length` tokens and of the memory, one per block."""
        layers = range(len(self.decoder.layers))
        return [KeyValueCache(length) for _ in layers], [KeyValueCache(memory_length) for _ in layers]

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        start_token: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Writes the output for an input, with cached keys and values. Dropout acts in training mode: call eval().

        Args:
            ids: (B, S) int64, the input. max_new_tokens: the most tokens to write.
            attention_mask: (B, S), true where a token takes part; None for all.
            start_token: what the decoder begins with; 0 in T5's files. stop_token: ends a row; 1 in T5's files.
            temperature, top_k, top_p, generator: see GPT.generate.
        Returns:
            (B, n) int64, n <= max_new_tokens, without the start token.
        Raises:
            ValueError: a number out of its range, shapes that do not fit.
        """
        if max_new_tokens < 0:
            raise ValueError(f"T5.generate: expected max_new_tokens >= 0, got {max_new_tokens}")
        pick = sampler("T5.generate", temperature, top_k, top_p, generator)
        memory = self.encode(ids, attention_mask)
        caches = self.caches(max_new_tokens, ids.shape[1])

        def logits(new: Tensor) -> Tensor:
            return self.decode(new, memory, attention_mask, caches)[:, -1]

        start = ids.new_full((ids.shape[0], 1), start_token)
        return extend(start, max_new_tokens, logits, pick, stop_token)[:, 1:]

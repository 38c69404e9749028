"""Transformers: the encoder-decoder, BERT, GPT, T5 and ViT, on pynn's attention."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.key_value_cache import KeyValueCache
from ._encoder_decoder import T5, Transformer
from ._generation import extend, sampler
from ._positions import LearnedPositionalEmbedding, RelativePositionBias, RotaryEmbedding, SinusoidalPositionalEncoding
from ._transformer import (
    Attention,
    Stack,
    TransformerBlock,
    activation_named,
    check_tokens,
    key_mask,
    make_norm,
    normal_init,
)
from ._vit import ViT

__all__ = [
    "GPT",
    "T5",
    "Attention",
    "Bert",
    "BertOutputs",
    "KeyValueCache",
    "LearnedPositionalEmbedding",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SinusoidalPositionalEncoding",
    "Transformer",
    "TransformerBlock",
    "ViT",
]


class BertOutputs(NamedTuple):
    """What Bert returns; None for a head that the model was built without."""

    hidden: Tensor  # (B, L, width)
    pooled: Tensor | None  # (B, width)
    token_logits: Tensor | None  # (B, L, vocab_size)
    sentence_logits: Tensor | None  # (B, 2)


class Bert(nn.Module):
    """BERT: an encoder trained to name masked tokens and to judge pairs of sentences.

    Devlin et al., https://arxiv.org/abs/1810.04805. The sentence head serves next-sentence prediction as well as
    sentence-order prediction (ALBERT, https://arxiv.org/abs/1909.11942): they differ in the training data only.

    Args:
        vocab_size: tokens. context_length: longest sequence. width, layers, heads: of the blocks.
        mlp_width: None for 4 width. segments: kinds of segment, 0 for no segment embedding.
        mlm: the masked-token head, whose weights are the token embedding's.
        pooler: a tanh layer on the first token. sentence: the two-class head on it.
        dropout, activation, eps: see TransformerBlock.
        padding_token: RoBERTa's positions: tokens that are not this one are counted from padding_token + 1 on.
    Raises:
        ValueError: sentence without pooler; see TransformerBlock.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int | None = None,
        segments: int = 2,
        mlm: bool = True,
        pooler: bool = True,
        sentence: bool = True,
        dropout: float = 0.1,
        activation: str = "gelu",
        eps: float = 1e-12,
        padding_token: int | None = None,
    ) -> None:
        super().__init__()
        if sentence and not pooler:
            raise ValueError("Bert: the sentence head reads the pooler: expected pooler=True with sentence=True")
        self.width, self.context_length, self.padding_token = width, context_length, padding_token
        positions = context_length if padding_token is None else context_length + padding_token + 1
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(positions, width)
        self.segment_embedding = nn.Embedding(segments, width) if segments else None
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"norm": "post", "activation": activation, "dropout": dropout, "eps": eps}
        mlp_width = 4 * width if mlp_width is None else mlp_width
        self.encoder = Stack([TransformerBlock(width, heads, mlp_width, **options) for _ in range(layers)], None)
        self.pooler = nn.Linear(width, width) if pooler else None
        self.sentence_head = nn.Linear(width, 2) if sentence else None
        self.mlm_dense = nn.Linear(width, width) if mlm else None
        self.mlm_norm = nn.LayerNorm(width, eps) if mlm else None
        self.mlm_bias = nn.Parameter(torch.zeros(vocab_size)) if mlm else None
        self.activation = activation_named("Bert", activation)
        normal_init(self)

    def _positions(self, ids: Tensor) -> Tensor:
        if self.padding_token is None:
            return torch.arange(ids.shape[1], device=ids.device)
        real = (ids != self.padding_token).long()
        return real.cumsum(1) * real + self.padding_token

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> BertOutputs:
        """Hidden states and what the heads say.

        Args:
            ids: (B, L) int64. attention_mask: (B, L), true where a token takes part; None for all.
            segment_ids: (B, L) int64; None for all 0.
        Raises:
            ValueError: shapes do not fit, L > context_length, or segment_ids in a model without segments.
        """
        check_tokens("Bert", "ids", ids, self.context_length)
        mask = key_mask("Bert", attention_mask, ids.shape)
        if segment_ids is not None and (self.segment_embedding is None or segment_ids.shape != ids.shape):
            kinds = 0 if self.segment_embedding is None else self.segment_embedding.num_embeddings
            got = tuple(segment_ids.shape)
            raise ValueError(f"Bert: expected segment_ids of shape {tuple(ids.shape)} ({kinds} segments), got {got}")
        x = self.token_embedding(ids) + self.position_embedding(self._positions(ids))
        if self.segment_embedding is not None:
            x = x + self.segment_embedding(torch.zeros_like(ids) if segment_ids is None else segment_ids)
        x = self.encoder(self.dropout(self.norm(x)), mask=mask)
        pooled = token_logits = sentence_logits = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(x[:, 0]))
        if self.sentence_head is not None and pooled is not None:
            sentence_logits = self.sentence_head(self.dropout(pooled))
        if self.mlm_dense is not None and self.mlm_norm is not None:
            h = self.mlm_norm(self.activation(self.mlm_dense(x)))
            token_logits = F.linear(h, self.token_embedding.weight, self.mlm_bias)
        return BertOutputs(x, pooled, token_logits, sentence_logits)


class GPT(nn.Module):
    """A decoder-only language model in GPT-2's form.

    Radford et al., "Language models are unsupervised multitask learners", 2019: pre-normalisation, tanh GELU, learned
    positions and an output layer whose weights are the token embedding's.

    Args:
        vocab_size: tokens. context_length: longest sequence. width, layers, heads: of the blocks.
        mlp_width: None for 4 width. positions: "learned", "sinusoidal" or "rotary".
        dropout, activation, rms, bias, eps: see TransformerBlock.
        tied: the output layer shares the token embedding's weights.
    Raises:
        ValueError: unknown positions; see TransformerBlock.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_width: int | None = None,
        positions: str = "learned",
        dropout: float = 0.0,
        activation: str = "gelu_tanh",
        rms: bool = False,
        bias: bool = True,
        eps: float = 1e-5,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if positions not in ("learned", "sinusoidal", "rotary"):
            raise ValueError(f'GPT: expected positions to be "learned", "sinusoidal" or "rotary", got {positions!r}')
        self.vocab_size, self.context_length = vocab_size, context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding: nn.Module | None = None
        self.rotary: RotaryEmbedding | None = None
        if positions == "rotary":
            self.rotary = RotaryEmbedding(width // heads)
        elif positions == "learned":
            self.position_embedding = LearnedPositionalEmbedding(context_length, width)
        else:
            self.position_embedding = SinusoidalPositionalEncoding(context_length, width)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"activation": activation, "rms": rms, "bias": bias, "dropout": dropout, "eps": eps}
        mlp_width = 4 * width if mlp_width is None else mlp_width
        blocks = [TransformerBlock(width, heads, mlp_width, norm="pre", **options) for _ in range(layers)]
        self.decoder = Stack(blocks, make_norm(width, eps, rms, bias))
        self.head = None if tied else nn.Linear(width, vocab_size, bias=False)
        normal_init(self)
        for block in blocks:  # the sums over all blocks start with variance independent of their number
            for layer in (block.self_attn.out_proj, block.linear2):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * layers))

    def caches(self) -> list[KeyValueCache]:
        """Empty caches for forward, one per block."""
        return [KeyValueCache(self.context_length) for _ in self.decoder.layers]

    def forward(self, ids: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """Logits of the token after each.

        Args:
            ids: (B, L) int64. caches: those of the tokens before ids, from `caches`; the new ones are added.
        Returns:
            (B, L, vocab_size).
        Raises:
            ValueError: ids of another shape or dtype, or more than context_length tokens with those in the caches.
        """
        past = caches[0].used if caches else 0
        check_tokens("GPT", "ids", ids, self.context_length - past)
        x = self.token_embedding(ids)
        if self.position_embedding is not None:
            x = self.position_embedding(x, past)
        x = self.decoder(self.dropout(x), is_causal=True, rotary=self.rotary, caches=caches)
        return F.linear(x, self.token_embedding.weight) if self.head is None else self.head(x)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues a prompt token by token, with cached keys and values. Dropout acts in training mode: call eval().

        Args:
            ids: (B, L) int64, the prompt. max_new_tokens: the most tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: only the k most likely tokens. top_p: only the most likely tokens that together have probability p.
            stop_token: ends a row: it is filled up with this token, and all stop when all rows have ended.
            generator: of the draws.
        Returns:
            (B, L + n) int64, n <= max_new_tokens.
        Raises:
            ValueError: a number out of its range, or L + max_new_tokens > context_length.
        """
        check_tokens("GPT.generate", "ids", ids)
        if max_new_tokens < 0 or ids.shape[1] + max_new_tokens > self.context_length:
            raise ValueError(
                f"GPT.generate: expected 0 <= max_new_tokens <= {self.context_length - ids.shape[1]} "
                f"(context_length - L), got {max_new_tokens}"
            )
        pick = sampler("GPT.generate", temperature, top_k, top_p, generator)
        caches = self.caches()
        return extend(ids, max_new_tokens, lambda new: self(new, caches)[:, -1], pick, stop_token)
